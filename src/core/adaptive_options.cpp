#include "core/adaptive_options.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "decide/tile_mass.h"

namespace adaattn {
namespace {

using decide::Options;
using decide::Policy;
using decide::Precision;
using decide::Probe;
using decide::RankMode;

// Least mass level, needle share and error allowed by the named policies, calibrated on the reference model so that the
// loss grows by at most 0.1, 0.4 and 1 per cent. CUSTOM starts from BALANCED.
Options policy_defaults(Policy policy) {
  Options o;
  o.policy = policy;
  o.tiles = true;
  o.far_field = true;
  o.probe = Probe::kRank;
  o.probe_rank = 32;
  o.rank_mode = RankMode::kEnergy;
  o.verify_rows = 16;
  o.feedback = true;
  switch (policy) {
    case Policy::kQuality:
      o.tolerance = 0.10f;
      o.min_level = decide::level_for_mass(0.93);
      o.needle_share = 0.01f;
      o.rank_threshold = 0.99f;
      break;
    case Policy::kSpeed:
      o.tolerance = 0.40f;
      o.min_level = decide::level_for_mass(0.70);
      o.needle_share = 0.10f;
      o.rank_threshold = 0.95f;
      break;
    default:
      o.tolerance = 0.20f;
      o.min_level = decide::level_for_mass(0.85);
      o.needle_share = 0.05f;
      o.rank_threshold = 0.97f;
      break;
  }
  return o;
}

// Positive values stay positive and finite.
float narrow(double value) {
  using Limits = std::numeric_limits<float>;
  return static_cast<float>(std::clamp<double>(value, Limits::min(), Limits::max()));
}

double fraction(double value, const char* field, double otherwise) {
  if (value == 0) return otherwise;
  if (!(value > 0 && value <= 1))
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.%s is %g; expected a value in (0, 1], or 0 for the policy's own",
         field, value);
  return value;
}

int32_t choice(int32_t value, int32_t last, const char* field) {
  if (value < 0 || value > last)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.%s is %d; expected 0 to %d", field, value, last);
  return value;
}

bool is_on(adaattn_switch_t value, const char* field, bool otherwise) {
  choice(value, ADAATTN_SWITCH_OFF, field);
  return value == ADAATTN_SWITCH_DEFAULT ? otherwise : value == ADAATTN_SWITCH_ON;
}

int64_t count(int64_t value, int64_t last, const char* field, int64_t otherwise) {
  if (value == 0) return otherwise;
  if (value < 1 || value > last)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.%s is %lld; expected 1 to %lld, or 0 for the policy's own", field,
         static_cast<long long>(value), static_cast<long long>(last));
  return value;
}

Precision input_precision(Dtype dtype) {
  return dtype == Dtype::kF32 ? Precision::kF32 : dtype == Dtype::kF16 ? Precision::kF16 : Precision::kBF16;
}

// Fields that a named policy decides by itself: setting one of them is a contradiction, not a preference.
void refuse_custom_fields(const adaattn_adaptive_desc_t& d) {
  const struct {
    const char* name;
    bool set;
  } fields[] = {{"tile_mass", d.tile_mass != 0},   {"probe", d.probe != 0},
                {"probe_rank", d.probe_rank != 0}, {"needle_share", d.needle_share != 0},
                {"far_field", d.far_field != 0},   {"rank_mode", d.rank_mode != 0},
                {"rank_ratio", d.rank_ratio != 0}, {"rank_threshold", d.rank_threshold != 0},
                {"min_rank", d.min_rank != 0}};
  for (const auto& field : fields) {
    if (field.set)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.%s is set, and policy %d decides it; use ADAATTN_POLICY_CUSTOM",
           field.name, d.policy);
  }
}

}  // namespace

Options resolve_options(const adaattn_adaptive_desc_t& d, const Problem& problem) {
  const auto policy = static_cast<Policy>(choice(d.policy, ADAATTN_POLICY_CUSTOM, "policy"));
  if (d.reserved0 != 0) fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.reserved0 is %d; expected 0", d.reserved0);
  choice(d.probe, ADAATTN_PROBE_FULL, "probe");
  choice(d.rank_mode, ADAATTN_RANK_ENERGY, "rank_mode");
  choice(d.min_precision, ADAATTN_PRECISION_F32, "min_precision");
  choice(d.max_precision, ADAATTN_PRECISION_F32, "max_precision");
  choice(d.on_exceed, ADAATTN_ON_EXCEED_RECOMPUTE, "on_exceed");
  if (!(d.tolerance >= 0) || std::isinf(d.tolerance))
    fail(ADAATTN_ERROR_INVALID_ARGUMENT,
         "adaptive.tolerance is %g; expected a finite value > 0, or 0 for the policy's own", d.tolerance);
  if (policy == Policy::kExact) return {};
  if (problem.dtype_kv == Dtype::kE4M3)
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "adaptive.policy is %d; with E4M3 tensors only 0 (EXACT) is computed", d.policy);
  if (policy != Policy::kCustom) refuse_custom_fields(d);

  Options o = policy_defaults(policy);
  if (d.tolerance > 0) o.tolerance = narrow(d.tolerance);
  if (d.tile_mass != 0) o.min_level = decide::level_for_mass(fraction(d.tile_mass, "tile_mass", 0));
  if (d.probe != ADAATTN_PROBE_DEFAULT) o.probe = static_cast<Probe>(d.probe - ADAATTN_PROBE_OFF);
  o.probe_rank = static_cast<int>(
      count(d.probe_rank, problem.d_qk, "probe_rank", o.probe_rank < problem.d_qk ? o.probe_rank : problem.d_qk));
  o.needle_share = narrow(fraction(d.needle_share, "needle_share", o.needle_share));
  o.far_field = is_on(d.far_field, "far_field", o.far_field);
  if (d.rank_mode != ADAATTN_RANK_DEFAULT) o.rank_mode = static_cast<RankMode>(d.rank_mode - ADAATTN_RANK_OFF);
  o.rank_ratio = narrow(fraction(d.rank_ratio, "rank_ratio", o.rank_ratio));
  o.rank_threshold = narrow(fraction(d.rank_threshold, "rank_threshold", o.rank_threshold));
  o.min_rank =
      static_cast<int>(count(d.min_rank, problem.d_v, "min_rank", o.min_rank < problem.d_v ? o.min_rank : problem.d_v));

  const Precision input = input_precision(problem.dtype_kv);
  o.max_precision = d.max_precision == 0 ? input : static_cast<Precision>(d.max_precision);
  o.min_precision = d.min_precision == 0 ? (o.max_precision < input ? o.max_precision : input)
                                         : static_cast<Precision>(d.min_precision);
  if (o.min_precision > o.max_precision)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.min_precision (%d) is above adaptive.max_precision (%d)",
         static_cast<int>(o.min_precision), static_cast<int>(o.max_precision));

  if (d.verify_rows < -1)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT,
         "adaptive.verify_rows is %lld; expected -1 (none), 0 (the policy's own) or more",
         static_cast<long long>(d.verify_rows));
  if (d.verify_rows != 0)
    o.verify_rows = d.verify_rows < 0 ? 0 : static_cast<int>(d.verify_rows < 4096 ? d.verify_rows : 4096);
  o.feedback = is_on(d.feedback, "feedback", o.feedback) && o.verify_rows > 0;
  o.recompute = d.on_exceed == ADAATTN_ON_EXCEED_RECOMPUTE;
  if (o.recompute && o.verify_rows == 0)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.on_exceed is RECOMPUTE, which needs adaptive.verify_rows > 0");
  o.freeze = is_on(d.freeze, "freeze", false);
  o.seed = d.seed;
  o.max_workspace_bytes = d.max_workspace_bytes;
  return o;
}

}  // namespace adaattn
