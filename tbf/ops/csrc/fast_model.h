// What the fused encoder knows of a model: mirrored field by field by tbf/ops/fast_native.py.
//
// Shapes: D hidden, H heads, K head width, L loops, S stages, N state size, I inner width of Mamba.

#pragma once

#include <cstdint>

extern "C" {

enum Mixer : int64_t { kRetention, kTitan, kMamba, kOde, kSoftmax, kSigmoid };
enum NormKind : int64_t { kRms, kLayerNorm, kDerf, kTanh };
enum Activation : int64_t { kSquaredRelu, kSilu, kGelu };

struct Linear {  // ternary weights of two bits, one operand per slice, at most 8
  int64_t inner, outer, slices;
  const int64_t* widths;
  const uint8_t* const* quads;
  const float* scales;
  const float* gain;  // [inner] or null: of the RMSNorm before quantising
  float eps;
};

struct Norm {
  int64_t kind;
  const float *weight, *bias;  // [L, D]
  const float *alpha, *shift;  // [L]
  float eps;
};

struct Layer {
  int64_t mixer, window;
  Norm mixer_norm, ffn_norm;
  Linear in, out, up, down;
  const float *q_gain, *k_gain;                            // attention: [K]
  const float *tau, *stage_scale;                          // ODE: [L, D], [S, D]
  const float *taps, *tap_bias, *rate, *step_bias, *skip;  // Mamba: [k, I + 4 N], [I + 4 N], [H], [H], [H]
  const float *gates, *gate_bias, *initial;                // Titan's memory: [D, 7 H], [7 H], [H, K, K]; or null
};

struct Model {
  int64_t hidden, loops, layers, gated, activation;
  int64_t heads, head_dim, retention_heads, retention_dim, inner, state, mamba_heads, mamba_dim, taps;
  int64_t stages, steps, hope, memory_chunk;
  float eps;
  const Layer* layer;
  const float *inject, *shift, *final_gain;  // [L, D], [L, D], [D]
  const float* log_gamma;                    // [H]
  const float *theta, *theta_prime;          // [H, K / 2], [H]
  const float *rope, *retention_rope;        // [2, T, K]: cosines, then sines with the sign that the swapped pair takes
  int64_t positions;                         // T of both
};

}  // extern "C"
