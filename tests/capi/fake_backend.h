// A back-end that computes nothing: it remembers what it was given, fills outputs, and fails or blocks on demand.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "backend.h"

namespace adaattn::test {

struct FakeState {
  // What the calls so far left behind.
  Problem problem;  // of the last selection
  AttnParams attention;
  MergeParams merge;
  EntropyParams entropy;
  LowRankParams low_rank;
  ProjectParams project;
  EffectiveRankParams effective_rank;
  SpectralNormParams spectral_norm;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  int plans_made = 0, plans_alive = 0, executed = 0, tools_run = 0;

  // What the next calls shall do.
  adaattn_device_t device = ADAATTN_DEVICE_CPU;
  size_t workspace_needed = 0;
  std::function<void()> on_select, on_execute;
  const void* foreign_pointer = nullptr;  // check_pointer refuses this one
  bool write_outputs = true;
};

std::unique_ptr<Backend> make_fake_backend(std::shared_ptr<FakeState> state, Allocator allocator = {});

// Fills every element that the operand's view names with value.
void fill_rows(const Operand& operand, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, float value);

// How many bytes from `data` a call may reach in a tensor, by the numbers that a kernel gets.
struct Reach {
  const char* field;
  const void* data;
  int64_t bytes;
};
std::vector<Reach> reach_of(const AttnParams& params);
Reach reach_of(const MatrixBatch& matrix, const char* field);

}  // namespace adaattn::test
