#include "harness.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "bench_commit.h"

namespace adaattn::bench {

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kMinRuns = 7;

double microseconds(const std::function<void()>& call) {
  const auto start = Clock::now();
  call();
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

Timing summary(std::vector<double> us) {
  std::sort(us.begin(), us.end());
  const double median = us[us.size() / 2];
  return {median, (us.back() - us.front()) / median};
}

}  // namespace

Timing measure(const std::function<void()>& call, double seconds) {
  call();
  std::vector<double> us;
  for (double total = 0; us.size() < kMinRuns || total < seconds * 1e6; total += us.back())
    us.push_back(microseconds(call));
  return summary(us);
}

TimingPair measure_pair(const std::function<void()>& ours, const std::function<void()>& peer, double seconds) {
  ours();
  peer();
  std::vector<double> us, peer_us;
  for (double total = 0; us.size() < kMinRuns || total < seconds * 1e6; total += us.back() + peer_us.back()) {
    us.push_back(microseconds(ours));
    peer_us.push_back(microseconds(peer));
  }
  std::vector<double> ratios;
  for (size_t i = 0; i < us.size(); ++i) ratios.push_back(peer_us[i] / us[i]);
  TimingPair times = {summary(us), summary(peer_us)};
  times.peer.us = times.ours.us * summary(ratios).us;
  return times;
}

void Report::add_ceiling(const std::string& name, double value) {
  ceilings_[name] = value;
  std::printf("%-48s %10.1f\n", name.c_str(), value);
}

void Report::add(const Row& row) {
  rows_.push_back(row);
  std::printf("%-48s %10.1f us  +-%4.0f %%  %8.1f %-8s error %.1e", row.name.c_str(), row.time.us, 50 * row.time.spread,
              row.rate, row.unit.c_str(), row.error);
  if (!row.peer.empty()) std::printf("  %.2f x %s", row.peer_us / row.time.us, row.peer.c_str());
  for (const auto& [name, value] : row.details) std::printf("  %s %.4g", name.c_str(), value);
  std::printf("\n");
  std::fflush(stdout);
}

const Row* Report::find(const std::string& name) const {
  for (const Row& row : rows_)
    if (row.name == name) return &row;
  return nullptr;
}

void Report::write(const std::string& path) const {
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  nlohmann::ordered_json json = {{"device", device_}, {"date", date}, {"commit", ADAATTN_BENCH_COMMIT}};
  json["ceilings"] = ceilings_;
  json["rows"] = nlohmann::ordered_json::array();
  for (const Row& row : rows_) {
    nlohmann::ordered_json out = {{"name", row.name}, {"ours_us", row.time.us}, {"spread", row.time.spread},
                                  {"rate", row.rate}, {"unit", row.unit},       {"error", row.error},
                                  {"peer", row.peer}};
    if (!row.peer.empty()) {
      out["peer_us"] = row.peer_us;
      out["ratio"] = row.peer_us / row.time.us;
    }
    if (!row.details.empty()) out["details"] = row.details;
    json["rows"].push_back(out);
  }
  std::ofstream file(path);
  file << json.dump(1) << "\n";
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path);
}

}  // namespace adaattn::bench
