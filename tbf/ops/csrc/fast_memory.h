// The neural memory of Titans for the fused encoder: tbf/ops/titan_scan.py for a document that starts with its row.
//
// Chunk edges then are window edges, so that a window needs one anchor: the memory that it starts with.

#pragma once

#include "fast_mixers.h"

#if TBF_GEMM
namespace {

constexpr float kMaxMomentum = 0.95f, kGateEps = 1e-6f, kReadEps = 1e-4f;

// A head's rows of q, k (normed, [T, K]) and v walked in one direction; adds what is read to out [T, K]. `gates` [T]
// are `ld_gates` apart: step, momentum and forgetting, H apart from each other, before the sigmoid.
inline void walk_memory(int64_t chunk, int64_t heads, const float* q, const float* k, const float* v, int64_t ldv,
                        const float* gates, int64_t ld_gates, const float* initial, int64_t tokens, int64_t width,
                        bool backwards, float* out) {
  Scratch& s = scratch();
  int64_t ld = width;
  if (backwards) {
    q += (tokens - 1) * ld, k += (tokens - 1) * ld, out += (tokens - 1) * ld, ld = -ld;
    v += (tokens - 1) * ldv, ldv = -ldv;
    gates += (tokens - 1) * ld_gates, ld_gates = -ld_gates;
  }
  const int64_t size = std::min(chunk, tokens), square = size * size, area = width * width;
  float *memory = s.state.get(2 * area), *momentum = memory + area;
  float *errors = s.values.get(2 * size * width), *read = errors + size * width;
  float *keys = s.scores.get(2 * width * size), *scaled = keys + width * size;  // [K, C]
  float *forget = s.other.get(4 * square), *carry = forget + square, *both = carry + square, *pairs = both + square;
  float *age = s.factors.get(5 * size), *momentum_age = age + size, *step = momentum_age + size, *b = step + size,
        *f = b + size;
  std::copy(initial, initial + area, memory);
  std::fill(momentum, momentum + area, 0.0f);
  const auto gate = [](float x) { return 1.0f / (1.0f + std::exp(-x)); };
  const auto mix = [&](float by_memory, float by_momentum, float* to) {
    each(area, [&](int64_t i, __mmask16 m) {
      const __m512 part = to == memory ? _mm512_mul_ps(load(memory + i, m), all(by_memory)) : all(0);
      store(to + i, _mm512_fmadd_ps(load(momentum + i, m), all(by_momentum), part), m);
    });
  };
  for (int64_t z = 0; z < tokens; z += size) {
    const int64_t here = std::min(size, tokens - z);
    float beta = 0, eta = 0;
    for (int64_t t = 0; t < here; ++t) {
      const float* raw = gates + (z + t) * ld_gates;
      const float rate = kMaxMomentum * gate(raw[heads]);
      step[t] = gate(raw[0]) * (1 - rate) / chunk;
      age[t] = beta += std::log1p(-std::min(gate(raw[2 * heads]), 1 - kGateEps));
      momentum_age[t] = eta += std::log(std::max(rate, kGateEps));
      b[t] = std::exp(beta);
    }
    for (int64_t i = 0; i < here; ++i) {
      float *row = forget + i * size, *other = carry + i * size;
      each(here, [&](int64_t j, __mmask16 m) {
        const __mmask16 past = m & (j > i ? 0 : lanes(i + 1 - j));
        store(row + j, _mm512_maskz_mov_ps(past, exp(_mm512_sub_ps(all(age[i]), load(age + j, m)))), m);
        const __m512 kept = exp(_mm512_sub_ps(all(momentum_age[i]), load(momentum_age + j, m)));
        store(other + j, _mm512_maskz_mul_ps(past, kept, load(step + j, m)), m);
      });
    }
    multiply({forget, size, 1}, carry, size, both, size, here, here, here);  // G
    for (int64_t i = 0; i < here; ++i) {
      f[i] = 0;
      for (int64_t j = 0; j <= i; ++j) f[i] += forget[i * size + j] * std::exp(momentum_age[j]);
    }
    for (int64_t t = 0; t < here; ++t) to_column(k + (z + t) * ld, width, keys + t, size);
    multiply({k + z * ld, ld, 1}, memory, width, errors, width, here, width, width);
    for (int64_t t = 0; t < here; ++t)
      each(width, [&](int64_t c, __mmask16 m) {
        const __m512 error = _mm512_sub_ps(load(v + (z + t) * ldv + c, m), load(errors + t * width + c, m));
        store(errors + t * width + c, _mm512_mul_ps(all(2), error), m);
      });
    float* to = out + z * ld;
    const auto add_read = [&](const float* matrix, const float* factor) {
      multiply({q + z * ld, ld, 1}, matrix, width, read, width, here, width, width);
      for (int64_t t = 0; t < here; ++t)
        each(width, [&](int64_t c, __mmask16 m) {
          store(to + t * ld + c,
                _mm512_fmadd_ps(load(read + t * width + c, m), all(factor[t]), load(to + t * ld + c, m)), m);
        });
    };
    add_read(memory, b);
    if (z > 0) add_read(momentum, f);
    multiply({q + z * ld, ld, 1}, keys, size, pairs, size, here, here, width);
    for (int64_t i = 0; i < here; ++i) times(pairs + i * size, both + i * size, here, pairs + i * size);
    multiply({pairs, size, 1}, errors, width, to, ld, here, width, here, true);
    if (z + here == tokens) return;
    const int64_t last = here - 1;
    mix(b[last], f[last], memory);
    mix(0, std::exp(momentum_age[last]), momentum);
    for (int64_t c = 0; c < width; ++c) times(keys + c * size, both + last * size, here, scaled + c * size);
    multiply({scaled, size, 1}, errors, width, memory, width, width, width, here, true);
    for (int64_t c = 0; c < width; ++c) times(keys + c * size, carry + last * size, here, scaled + c * size);
    multiply({scaled, size, 1}, errors, width, momentum, width, width, width, here, true);
  }
}

// Adds the gated read of head h to out [T, K]; `gates` [T, 7 H] before the sigmoid.
inline void titan_memory(const Model& model, const Layer& layer, const Head& head, int64_t h, const float* gates,
                         float* out, int64_t ldo) {
  Scratch& s = scratch();
  const int64_t width = head.width, tokens = head.tokens, heads = model.heads;
  float *query = s.query.get(tokens * width), *key = s.key.get(tokens * width), *read = s.work.get(tokens * width);
  std::fill(read, read + tokens * width, 0.0f);
  const auto unit = [&](const float* from, const float* gain, float* to) {
    normed(from, width, gain, model.eps, 1.0f, to);
    const __m512 by = all(1.0f / std::max(std::sqrt(sum_of_squares(to, width)), 1e-12f));
    each(width, [&](int64_t c, __mmask16 m) { store(to + c, _mm512_mul_ps(load(to + c, m), by), m); });
  };
  for (int64_t t = 0; t < tokens; ++t) {
    unit(head.q + t * head.ld, layer.q_gain, query + t * width);
    unit(head.k + t * head.ld, layer.k_gain, key + t * width);
  }
  for (int direction = 0; direction < 2; ++direction)
    walk_memory(model.memory_chunk, heads, query, key, head.v, head.ld, gates + 3 * direction * heads + h, 7 * heads,
                layer.initial + h * width * width, tokens, width, direction == 1, read);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = read + t * width;
    const float by = inverse_rms(row, width, kReadEps) / (1.0f + std::exp(-gates[t * 7 * heads + 6 * heads + h]));
    each(width, [&](int64_t c, __mmask16 m) {
      store(out + t * ldo + c, _mm512_fmadd_ps(load(row + c, m), all(by), load(out + t * ldo + c, m)), m);
    });
  }
}

}  // namespace
#endif
