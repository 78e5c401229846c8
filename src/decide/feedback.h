// The per-head multiplier on the predicted error, learned from the error that verify measures.
#pragma once

#include "core/host_device.h"

namespace adaattn::decide {

constexpr float kFeedbackMin = 0.0625f, kFeedbackMax = 16.0f;
// A few dozen sampled rows of one text underestimate the next one's error now and then; the multiplier keeps this much
// in hand.
constexpr float kFeedbackMargin = 2.0f;
// Share of the old multiplier that one call may take away. Upwards it follows at once.
constexpr float kFeedbackDecay = 0.7f;

// Of a head that was computed without skipping because of its prediction, where nothing was measured: what one sample
// said of it is forgotten slowly, and some calls later it is tried again.
constexpr float kFeedbackRest = 0.9f;
ADAATTN_HD inline float rested_feedback(float f) {
  return kFeedbackRest * f > kFeedbackMin ? kFeedbackRest * f : kFeedbackMin;
}

// predicted: the call's prediction, made with the multiplier f. measured: what verify found. A call that skipped
// nothing (predicted 0) teaches nothing.
ADAATTN_HD inline float next_feedback(float f, float predicted, float measured) {
  if (!(predicted > 0.0f) || !(measured >= 0.0f)) return f;
  const float wanted = kFeedbackMargin * measured * f / predicted;
  float next = wanted > kFeedbackDecay * f ? wanted : kFeedbackDecay * f;
  if (next < kFeedbackMin) next = kFeedbackMin;
  if (next > kFeedbackMax) next = kFeedbackMax;
  return next;
}

}  // namespace adaattn::decide
