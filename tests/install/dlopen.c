/* Loads the library by path as a foreign-function interface does, reads an error text, unloads and loads it again. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int round_trip(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  int32_t (*create)(const void*, void**);
  int32_t (*destroy)(void*);
  size_t (*last_error)(char*, size_t);
  *(void**)&create = dlsym(library, "adaattn_create");
  *(void**)&destroy = dlsym(library, "adaattn_destroy");
  *(void**)&last_error = dlsym(library, "adaattn_last_error");
  if (create == NULL || destroy == NULL || last_error == NULL) return 2;
  char text[256] = "";
  if (create(NULL, NULL) == 0 || last_error(text, sizeof text) == 0 || strstr(text, "context") == NULL) return 3;
  void* context = NULL;
  if (create(NULL, &context) != 0 || destroy(context) != 0) return 4;
  return dlclose(library) == 0 ? 0 : 5;
}

int main(int argc, char** argv) {
  if (argc != 2) return 64;
  const int first = round_trip(argv[1]);
  const int result = first != 0 ? first : round_trip(argv[1]);
  printf("dlopen round trips: %d\n", result);
  return result;
}
