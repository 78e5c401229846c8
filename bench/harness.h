// What every suite shares: timing, rows, and the JSON file that a run leaves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace adaattn::bench {

struct Timing {
  double us = 0;      // median
  double spread = 0;  // (max - min) / median
};

// Host time of `call` after one warm-up: at least 7 runs and `seconds` in all.
Timing measure(const std::function<void()>& call, double seconds = 0.4);

// Two calls measured in turns, so that what slows the machine down for a while slows down both; the peer's time is ours
// times the median of the pairs' ratios.
struct TimingPair {
  Timing ours, peer;
};
TimingPair measure_pair(const std::function<void()>& ours, const std::function<void()>& peer, double seconds = 1.2);

struct Row {
  std::string name;  // direction/dtype/d<qk>/mask/b<batch>h<heads>kv<heads>/s<keys>[q<queries>]...
  Timing time;
  double rate = 0;
  std::string unit;  // of rate: GFLOP/s, GB/s, TFLOP/s
  double error = 0;  // relative to the float64 oracle
  std::string peer;  // what peer_us is the time of, for the same work
  double peer_us = 0;
  std::map<std::string, double> details;  // what else a suite has to say, by name
};

// Collects a run and prints it as it goes.
class Report {
 public:
  // Rows whose name contains one of these; none: all rows.
  explicit Report(std::vector<std::string> filter) : filter_(std::move(filter)) {}
  void set_device(std::string name) { device_ = std::move(name); }
  void add_ceiling(const std::string& name, double value);
  double ceiling(const std::string& name) const { return ceilings_.at(name); }
  bool has_ceiling(const std::string& name) const { return ceilings_.count(name) != 0; }
  bool wants(const std::string& name) const {
    return filter_.empty() || std::any_of(filter_.begin(), filter_.end(), [&](const std::string& part) {
             return name.find(part) != std::string::npos;
           });
  }
  void add(const Row& row);
  const Row* find(const std::string& name) const;
  void write(const std::string& path) const;

 private:
  std::vector<std::string> filter_;
  std::string device_;
  std::map<std::string, double> ceilings_;
  std::vector<Row> rows_;
};

struct Suite {
  const char* name;
  void (*run)(Report& report);
};

void run_cpu_exact(Report& report);
void run_cpu_tools(Report& report);
void run_cpu_adaptive(Report& report);   // only in builds with the examples
void run_cuda_adaptive(Report& report);  // these three only in builds with CUDA
void run_cuda_exact(Report& report);
void run_cuda_tools(Report& report);
void run_cuda_policies(Report& report);  // only with both

}  // namespace adaattn::bench
