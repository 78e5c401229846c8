#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <string>

#include "harness.h"

int main(int argc, char** argv) {
  using namespace adaattn::bench;
  constexpr Suite kSuites[] = {
    {"cpu_exact", run_cpu_exact},
    {"cpu_tools", run_cpu_tools},
#ifdef ADAATTN_BENCH_MODEL
    {"cpu_adaptive", run_cpu_adaptive},
#endif
#ifdef ADAATTN_WITH_CUDA
    {"cuda_adaptive", run_cuda_adaptive},
    {"cuda_exact", run_cuda_exact},
    {"cuda_tools", run_cuda_tools},
#endif
#if defined(ADAATTN_WITH_CUDA) && defined(ADAATTN_BENCH_MODEL)
    {"cuda_policies", run_cuda_policies},
#endif
  };

  CLI::App app("Benches of libadaattn");
  std::string suite, out;
  std::vector<std::string> filter;
  app.add_option(
         "--suite", suite,
         "cpu_exact, cpu_tools, cpu_adaptive, or with CUDA cuda_adaptive, cuda_exact, cuda_tools, cuda_policies")
      ->required();
  app.add_option("--out", out, "JSON file to write");
  app.add_option("--filter", filter, "run only the rows whose name contains one of these")->delimiter(',');
  CLI11_PARSE(app, argc, argv);
  try {
    for (const Suite& s : kSuites) {
      if (suite != s.name) continue;
      Report report(filter);
      s.run(report);
      if (!out.empty()) report.write(out);
      return 0;
    }
    std::fprintf(stderr, "there is no suite '%s' in this build; there are:", suite.c_str());
    for (const Suite& s : kSuites) std::fprintf(stderr, " %s", s.name);
    std::fputc('\n', stderr);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
  }
  return 1;
}
