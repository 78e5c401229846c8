#include <adaattn/adaattn.h>
#include <stdio.h>

int main(void) {
  adaattn_context_t* context = NULL;
  if (adaattn_create(NULL, &context) != ADAATTN_SUCCESS) return 1;
  puts(adaattn_build_info());
  return adaattn_destroy(context) != ADAATTN_SUCCESS || adaattn_version() != ADAATTN_VERSION;
}
