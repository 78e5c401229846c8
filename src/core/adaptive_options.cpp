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
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.%s is %g; accepted: above 0, at most 1, or 0 for the policy's own",
         field, value);
  return value;
}

constexpr const char* kPolicies[] = {"EXACT", "QUALITY", "BALANCED", "SPEED", "CUSTOM"};
constexpr const char *kPrecisions = "0 (DEFAULT), 1 (I8), 2 (BF16), 3 (F16), 4 (F32)",
                     *kSwitches = "0 (DEFAULT), 1 (ON), 2 (OFF)";

int32_t choice(int32_t value, int32_t last, const char* field, const char* accepted) {
  if (value < 0 || value > last)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.%s is %d; accepted: %s", field, value, accepted);
  return value;
}

bool is_on(adaattn_switch_t value, const char* field, bool otherwise) {
  choice(value, ADAATTN_SWITCH_OFF, field, kSwitches);
  return value == ADAATTN_SWITCH_DEFAULT ? otherwise : value == ADAATTN_SWITCH_ON;
}

int64_t count(int64_t value, int64_t last, const char* field, int64_t otherwise) {
  if (value == 0) return otherwise;
  if (value < 1 || value > last)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.%s is %lld; accepted: 1 to %lld, or 0 for the policy's own", field,
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
    double value;
  } fields[] = {{"tile_mass", d.tile_mass},
                {"probe", static_cast<double>(d.probe)},
                {"probe_rank", static_cast<double>(d.probe_rank)},
                {"needle_share", d.needle_share},
                {"far_field", static_cast<double>(d.far_field)},
                {"rank_mode", static_cast<double>(d.rank_mode)},
                {"rank_ratio", d.rank_ratio},
                {"rank_threshold", d.rank_threshold},
                {"min_rank", static_cast<double>(d.min_rank)}};
  for (const auto& [name, value] : fields)
    if (value != 0)
      fail(ADAATTN_ERROR_INVALID_ARGUMENT,
           "adaptive.%s is %g; accepted: 0 with adaptive.policy %d (%s), which sets it, or any with 4 (CUSTOM)", name,
           value, d.policy, kPolicies[d.policy]);
}

}  // namespace

Options resolve_options(const adaattn_adaptive_desc_t& d, const Problem& problem) {
  const auto policy = static_cast<Policy>(
      choice(d.policy, ADAATTN_POLICY_CUSTOM, "policy", "0 (EXACT), 1 (QUALITY), 2 (BALANCED), 3 (SPEED), 4 (CUSTOM)"));
  if (d.reserved0 != 0) fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.reserved0 is %d; accepted: 0", d.reserved0);
  choice(d.probe, ADAATTN_PROBE_FULL, "probe", "0 (DEFAULT), 1 (OFF), 2 (RANK), 3 (FULL)");
  choice(d.rank_mode, ADAATTN_RANK_ENERGY, "rank_mode", "0 (DEFAULT), 1 (OFF), 2 (FIXED), 3 (ENERGY)");
  choice(d.min_precision, ADAATTN_PRECISION_F32, "min_precision", kPrecisions);
  choice(d.max_precision, ADAATTN_PRECISION_F32, "max_precision", kPrecisions);
  choice(d.on_exceed, ADAATTN_ON_EXCEED_RECOMPUTE, "on_exceed", "0 (REPORT), 1 (RECOMPUTE)");
  if (!(d.tolerance >= 0) || std::isinf(d.tolerance))
    fail(ADAATTN_ERROR_INVALID_ARGUMENT,
         "adaptive.tolerance is %g; accepted: finite and above 0, or 0 for the policy's own", d.tolerance);
  if (policy == Policy::kExact) return {};
  if (problem.dtype_kv == Dtype::kE4M3)
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "adaptive.policy is %d (%s); accepted with E4M3 tensors: 0 (EXACT)", d.policy,
         kPolicies[d.policy]);
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
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "adaptive.min_precision is %d; accepted: at most adaptive.max_precision, %d",
         static_cast<int>(o.min_precision), static_cast<int>(o.max_precision));

  if (d.verify_rows < -1)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT,
         "adaptive.verify_rows is %lld; accepted: -1 (none), 0 (the policy's own) or more",
         static_cast<long long>(d.verify_rows));
  if (d.verify_rows != 0)
    o.verify_rows = d.verify_rows < 0 ? 0 : static_cast<int>(d.verify_rows < 4096 ? d.verify_rows : 4096);
  o.feedback = is_on(d.feedback, "feedback", o.feedback) && o.verify_rows > 0;
  o.recompute = d.on_exceed == ADAATTN_ON_EXCEED_RECOMPUTE;
  if (o.recompute && o.verify_rows == 0)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT,
         "adaptive.verify_rows is %lld; accepted: 0 or more with adaptive.on_exceed 1 (RECOMPUTE), which needs "
         "measured errors",
         static_cast<long long>(d.verify_rows));
  o.freeze = is_on(d.freeze, "freeze", false);
  o.seed = d.seed;
  o.max_workspace_bytes = d.max_workspace_bytes;
  return o;
}

}  // namespace adaattn
