// The token mixers of the fused encoder, one document and head (or direction) at a time.
//
// A document's tokens are rows of `y`, what the input projection gave, `ld` floats apart. Formulas and names are those
// of tbf/ops/{decay_scan,hope,titan_scan,rope}.py. Shapes: T tokens, K head width, P value width, N state size, C
// chunk.

#pragma once

#include "fast_math.h"
#include "fast_model.h"

#if TBF_GEMM
namespace {

constexpr int64_t kBlock = 48;  // queries that are scored together
constexpr int64_t kChunk = 64;  // tokens between which a scan passes its state on
constexpr float kStrongest = -32.0f;

// to[c] = RMS(from)[c] * gain[c] * factor, c < width; gain may be null, and then nothing is normed.
inline void normed(const float* from, int64_t width, const float* gain, float eps, float factor, float* to) {
  const __m512 by = all(gain ? inverse_rms(from, width, eps) * factor : factor);
  each(width, [&](int64_t c, __mmask16 m) {
    const __m512 v = _mm512_mul_ps(load(from + c, m), by);
    store(to + c, gain ? _mm512_mul_ps(v, load(gain + c, m)) : v, m);
  });
}

// Turns the pairs of x by the angles of its position.
inline void rotate(float* x, int64_t width, const float* cosines, const float* sines) {
  each(width, [&](int64_t c, __mmask16 m) {
    const __m512 v = load(x + c, m), swapped = _mm512_permute_ps(v, 0xB1);
    store(x + c, _mm512_fmadd_ps(v, load(cosines + c, m), _mm512_mul_ps(swapped, load(sines + c, m))), m);
  });
}

inline void to_column(const float* row, int64_t width, float* column, int64_t ld) {
  for (int64_t c = 0; c < width; ++c) column[c * ld] = row[c];
}

struct Head {  // where a head's queries, keys and values lie
  const float *q, *k, *v;
  int64_t ld, tokens, width;
};

// scores [rows, T] of queries first..first + rows -> weights; then out = weights v.
struct Weigh {
  const Head& head;
  int64_t reach;  // tokens to either side that a query sees
  bool by_sigmoid;

  void operator()(float* scores, int64_t ld, int64_t first, int64_t rows, float* out, int64_t ldo) const {
    float* sums = scratch().row.get(kBlock);
    const int64_t from = std::max<int64_t>(0, first - reach), to = std::min(head.tokens, first + rows + reach);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * ld;
      const int64_t low = std::max<int64_t>(0, first + r - reach), high = std::min(head.tokens, first + r + reach + 1);
      for (int64_t j = from; j < low; ++j) row[j] = 0;
      for (int64_t j = high; j < to; ++j) row[j] = 0;
      sums[r] = by_sigmoid ? sigmoids(row + low, high - low) : softmax(row + low, high - low);
    }
    multiply({scores + from, ld, 1}, head.v + from * head.ld, head.ld, out, ldo, rows, head.width, to - from);
    for (int64_t r = 0; r < rows; ++r)
      each(head.width, [&](int64_t c, __mmask16 m) {
        store(out + r * ldo + c, _mm512_mul_ps(load(out + r * ldo + c, m), all(1.0f / sums[r])), m);
      });
  }

  static float softmax(float* row, int64_t count) {  // without the division; returns the sum
    __m512 top = all(-std::numeric_limits<float>::infinity());
    each(count, [&](int64_t j, __mmask16 m) { top = _mm512_mask_max_ps(top, m, top, load(row + j, m)); });
    const __m512 largest = all(_mm512_reduce_max_ps(top));
    __m512 sum = all(0);
    each(count, [&](int64_t j, __mmask16 m) {
      const __m512 v = exp(_mm512_sub_ps(load(row + j, m), largest));
      sum = _mm512_mask_add_ps(sum, m, sum, v);
      store(row + j, v, m);
    });
    return _mm512_reduce_add_ps(sum);
  }

  static float sigmoids(float* row, int64_t count) {
    const __m512 bias = all(std::log(static_cast<float>(count)));
    each(count, [&](int64_t j, __mmask16 m) { store(row + j, sigmoid(_mm512_sub_ps(load(row + j, m), bias)), m); });
    return 1;
  }
};

// Queries [T, K] and keys [K, padded T] of a head into this thread's scratch, normed and, with `rope`, turned.
inline void load_head(const Head& head, const float* q_gain, const float* k_gain, float eps, const float* rope,
                      int64_t positions, float factor, bool factor_on_keys) {
  Scratch& s = scratch();
  const int64_t width = head.width, ldk = padded(head.tokens);
  float *query = s.query.get(head.tokens * width), *key = s.key.get(width * ldk), *row = s.row.get(width);
  for (int64_t t = 0; t < head.tokens; ++t) {
    float* q = query + t * width;
    normed(head.q + t * head.ld, width, q_gain, eps, factor_on_keys ? 1.0f : factor, q);
    normed(head.k + t * head.ld, width, k_gain, eps, factor_on_keys ? factor : 1.0f, row);
    if (rope) {
      const float *cosines = rope + t * width, *sines = cosines + positions * width;
      rotate(q, width, cosines, sines);
      rotate(row, width, cosines, sines);
    }
    to_column(row, width, key + t, ldk);
  }
}

inline void attention(const Model& model, const Layer& layer, const Head& head, float* out, int64_t ldo) {
  load_head(head, layer.q_gain, layer.k_gain, model.eps, model.rope, model.positions, 1.0f / std::sqrt(head.width),
            false);
  Scratch& s = scratch();
  const int64_t width = head.width, tokens = head.tokens, ldk = padded(tokens),
                reach = layer.window ? layer.window / 2 : tokens;
  const float *query = s.query.get(tokens * width), *key = s.key.get(width * ldk);
  float* scores = s.scores.get(kBlock * ldk);
  const Weigh weigh{head, reach, layer.mixer == kSigmoid};
  for (int64_t first = 0; first < tokens; first += kBlock) {
    const int64_t rows = std::min(kBlock, tokens - first);
    const int64_t from = std::max<int64_t>(0, first - reach), to = std::min(tokens, first + rows + reach);
    multiply({query + first * width, width, 1}, key + from, ldk, scores + from, ldk, rows, to - from, width);
    weigh(scores, ldk, first, rows, out + first * ldo, ldo);
  }
}

// HoPE's decays of one head, exp(-rate_c n) for distances n < most: by channel and falling distance for what lies
// behind a query, by channel and rising distance for what lies ahead, and by distance for the queries of a block.
struct HopeTables {
  float *behind, *ahead;            // [K, padded most]
  float *turn_behind, *turn_ahead;  // [kBlock, K]: row r is r tokens from the block's first query, or from its last
  int64_t most, ld;

  static int64_t size(int64_t width, int64_t most) { return 2 * width * (padded(most) + kBlock); }

  HopeTables(float* at, int64_t width, int64_t most)
      : behind(at),
        ahead(behind + width * padded(most)),
        turn_behind(ahead + width * padded(most)),
        turn_ahead(turn_behind + kBlock * width),
        most(most),
        ld(padded(most)) {}

  // Pairs (u, w) fall with (theta' - theta, theta' + theta) behind and the other way round ahead.
  void fill(const float* theta, float theta_prime, int64_t width) const {
    const __m512 ramp = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t c = 0; c < width; ++c) {
      const bool u = c < width / 2;
      const float here = theta[c % (width / 2)], slow = theta_prime - here, fast = theta_prime + here;
      each(most, [&](int64_t n, __mmask16 m) {
        const __m512 place = _mm512_add_ps(ramp, all(static_cast<float>(n)));
        const __m512 falling = _mm512_sub_ps(all(static_cast<float>(most - 1)), place);
        store(behind + c * ld + n, exp(_mm512_mul_ps(all(u ? -slow : -fast), falling)), m);
        store(ahead + c * ld + n, exp(_mm512_mul_ps(all(u ? -fast : -slow), place)), m);
      });
      for (int64_t r = 0; r < kBlock; ++r) {
        turn_behind[r * width + c] = behind[c * ld + most - 1 - r];
        turn_ahead[r * width + c] = ahead[c * ld + kBlock - 1 - r];
      }
    }
  }
};

inline void light_cone(const float* x, int64_t width, float factor, float* to) {
  const float by = factor * 0.707106781f;
  for (int64_t c = 0; c < width / 2; ++c) {
    const float a = x[2 * c], b = x[2 * c + 1];
    to[c] = (a + b) * by;
    to[c + width / 2] = (a - b) * by;
  }
}

inline void times(const float* a, const float* b, int64_t count, float* to) {
  each(count, [&](int64_t i, __mmask16 m) { store(to + i, _mm512_mul_ps(load(a + i, m), load(b + i, m)), m); });
}

inline void over(const float* a, const float* b, int64_t count, float* to) {
  each(count,
       [&](int64_t i, __mmask16 m) { store(to + i, _mm512_maskz_div_ps(m, load(a + i, m), load(b + i, m)), m); });
}

inline void hope(const Model& model, const Layer& layer, const Head& head, const HopeTables& d, float* out,
                 int64_t ldo) {
  Scratch& s = scratch();
  const int64_t width = head.width, tokens = head.tokens, ldk = padded(tokens);
  const int64_t reach = layer.window ? layer.window / 2 : tokens;
  float *query = s.query.get(tokens * width), *key = s.key.get(width * ldk), *row = s.row.get(2 * width);
  for (int64_t t = 0; t < tokens; ++t) {
    normed(head.q + t * head.ld, width, layer.q_gain, model.eps, 1.0f, row);
    light_cone(row, width, 1.0f / std::sqrt(width), query + t * width);
    normed(head.k + t * head.ld, width, layer.k_gain, model.eps, 1.0f, row);
    light_cone(row, width, 1.0f, row + width);
    to_column(row + width, width, key + t, ldk);
  }
  float *scores = s.scores.get(kBlock * ldk), *later = s.other.get(kBlock * kBlock);
  float *keys = s.work.get(width * (ldk + kBlock)), *own = keys + width * ldk, *turned = s.factors.get(kBlock * width);
  const Weigh weigh{head, reach, false};
  for (int64_t first = 0; first < tokens; first += kBlock) {
    const int64_t rows = std::min(kBlock, tokens - first), end = first + rows;
    const int64_t from = std::max<int64_t>(0, first - reach), to = std::min(tokens, end + reach);
    // Positions count from the block's first query for what is behind and from its last for what is ahead, so that no
    // exponent is positive there; on the wrong side of a query inside the block they reach 48 / 8 and aren't used.
    for (int64_t c = 0; c < width; ++c) {
      const int64_t twin = (c + width / 2) % width;  // the channel that falls ahead as c does behind
      const float* k = key + c * ldk;
      times(k + from, d.behind + c * d.ld + d.most - 1 - (first - from), first - from, keys + c * ldk + from);
      over(k + first, d.ahead + twin * d.ld, rows, keys + c * ldk + first);
      over(k + first, d.behind + twin * d.ld + d.most - kBlock, rows, own + c * kBlock);
      times(k + end, d.ahead + c * d.ld + 1, to - end, keys + c * ldk + end);
    }
    times(query + first * width, d.turn_behind, rows * width, turned);
    multiply({turned, width, 1}, keys + from, ldk, scores + from, ldk, rows, end - from, width);
    times(query + first * width, d.turn_ahead, rows * width, turned);
    multiply({turned, width, 1}, keys + end, ldk, scores + end, ldk, rows, to - end, width);  // then the block is full
    multiply({turned, width, 1}, own, kBlock, later, kBlock, rows, rows, width);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = r + 1; j < rows; ++j) scores[r * ldk + first + j] = later[r * kBlock + j];
    weigh(scores, ldk, first, rows, out + first * ldo, ldo);
  }
}

// The decayed scans. A state [K, P] passes from chunk to chunk; inside a chunk the weights form a matrix.

inline void retention(const Model& model, const Head& head, float log_gamma, float* out, int64_t ldo) {
  Scratch& s = scratch();
  const int64_t width = head.width, tokens = head.tokens, ldk = padded(tokens);
  const int64_t size = tokens <= kChunk + width ? tokens : kChunk;
  load_head(head, nullptr, nullptr, 0, model.retention_rope, model.positions, 1.0f / std::sqrt(width), true);
  const float *query = s.query.get(tokens * width), *key = s.key.get(width * ldk);
  float* powers = s.factors.get(2 * size + 1);  // gamma^|n - size|
  for (int64_t n = 0; n <= 2 * size; ++n) powers[n] = std::exp(log_gamma * std::abs(n - size));
  float *scores = s.scores.get(kBlock * size), *scaled = s.work.get(std::max(size, width) * std::max(size, width));
  for (int64_t z = 0; z < tokens; z += size) {
    const int64_t here = std::min(size, tokens - z);
    for (int64_t first = 0; first < here; first += kBlock) {
      const int64_t rows = std::min(kBlock, here - first);
      multiply({query + (z + first) * width, width, 1}, key + z, ldk, scores, size, rows, here, width);
      for (int64_t r = 0; r < rows; ++r) times(scores + r * size, powers + size - first - r, here, scores + r * size);
      multiply({scores, size, 1}, head.v + z * head.ld, head.ld, out + (z + first) * ldo, ldo, rows, width, here);
    }
  }
  if (size == tokens) return;
  float* state = s.state.get(width * width);
  const int64_t chunks = ceil_div(tokens, size);
  for (int backwards = 0; backwards < 2; ++backwards) {
    std::fill(state, state + width * width, 0.0f);
    for (int64_t step = 0; step < chunks; ++step) {
      const int64_t z = (backwards ? chunks - 1 - step : step) * size, here = std::min(size, tokens - z);
      for (int64_t t = 0; step && t < here; ++t) {
        const __m512 by = all(powers[size + (backwards ? here - t : t + 1)]);
        each(width, [&](int64_t c, __mmask16 m) {
          store(scaled + t * width + c, _mm512_mul_ps(load(query + (z + t) * width + c, m), by), m);
        });
      }
      if (step) multiply({scaled, width, 1}, state, width, out + z * ldo, ldo, here, width, width, true);
      for (int64_t c = 0; c < width; ++c)
        times(key + c * ldk + z, powers + (backwards ? size : size - here + 1), here, scaled + c * size);
      const __m512 through = all(powers[size + here]);
      each(width * width,
           [&](int64_t i, __mmask16 m) { store(state + i, _mm512_mul_ps(load(state + i, m), through), m); });
      multiply({scaled, size, 1}, head.v + z * head.ld, head.ld, state, width, width, width, here, true);
    }
  }
}

// One direction of Mamba-2's scan for all heads of a document. `channels` [T, I + 4 N]: values, then B and C of both
// directions; `steps` [T, H] of this direction. Writes out [T, I].
inline void mamba(const Model& model, const Layer& layer, const float* channels, int64_t ld, const float* steps,
                  int64_t ld_steps, int64_t tokens, bool backwards, float* out, int64_t ldo) {
  Scratch& s = scratch();
  const int64_t n = model.state, heads = model.mamba_heads, width = model.mamba_dim;
  const int64_t size = std::min(kChunk, tokens), to_b = model.inner + (backwards ? 2 * n : 0), to_c = to_b + n;
  if (backwards) {  // the same scan over rows that run from the last to the first
    channels += (tokens - 1) * ld, ld = -ld;
    steps += (tokens - 1) * ld_steps, ld_steps = -ld_steps;
    out += (tokens - 1) * ldo, ldo = -ldo;
  }
  float *written = s.key.get(n * size), *scores = s.scores.get(size * size), *weights = s.other.get(size * size);
  float *scaled = s.work.get(n * size), *read = s.query.get(size * n), *states = s.states.get(heads * n * width);
  float *age = s.factors.get(3 * size), *step = age + size, *leaving = step + size;
  std::fill(states, states + heads * n * width, 0.0f);
  for (int64_t z = 0; z < tokens; z += size) {
    const int64_t here = std::min(size, tokens - z);
    const float* rows = channels + z * ld;
    for (int64_t t = 0; t < here; ++t) to_column(rows + t * ld + to_b, n, written + t, size);
    multiply({rows + to_c, ld, 1}, written, size, scores, size, here, here, n);
    for (int64_t h = 0; h < heads; ++h) {
      const float* values = rows + h * width;
      float *to = out + z * ldo + h * width, *state = states + h * n * width, total = 0;
      for (int64_t t = 0; t < here; ++t) {
        step[t] = steps[(z + t) * ld_steps + h];
        age[t] = total += std::max(step[t] * layer.rate[h], kStrongest);
      }
      for (int64_t i = 0; i < here; ++i) {
        float* row = weights + i * size;
        each(backwards ? i : i + 1, [&](int64_t j, __mmask16 m) {
          const __m512 decay = exp(_mm512_sub_ps(all(age[i]), load(age + j, m)));
          store(row + j, _mm512_mul_ps(_mm512_mul_ps(decay, load(step + j, m)), load(scores + i * size + j, m)), m);
        });
        for (int64_t j = backwards ? i : i + 1; j < std::min(here, (i / 6 + 1) * 6); ++j) row[j] = 0;
      }
      for (int64_t i = 0; i < here; i += 6) {  // what lies after a row's own token weighs nothing
        const int64_t count = std::min<int64_t>(6, here - i);
        multiply({weights + i * size, size, 1}, values, ld, to + i * ldo, ldo, count, width, i + count);
      }
      if (z > 0) {
        for (int64_t t = 0; t < here; ++t) {
          const __m512 by = all(std::exp(age[t]));
          each(n, [&](int64_t c, __mmask16 m) {
            store(read + t * n + c, _mm512_mul_ps(load(rows + t * ld + to_c + c, m), by), m);
          });
        }
        multiply({read, n, 1}, state, width, to, ldo, here, width, n, true);
      }
      if (z + here == tokens) continue;
      for (int64_t t = 0; t < here; ++t) leaving[t] = std::exp(total - age[t]) * step[t];
      for (int64_t c = 0; c < n; ++c) times(written + c * size, leaving, here, scaled + c * size);
      const __m512 through = all(std::exp(total));
      each(n * width, [&](int64_t i, __mmask16 m) { store(state + i, _mm512_mul_ps(load(state + i, m), through), m); });
      multiply({scaled, size, 1}, values, ld, state, width, n, width, here, true);
    }
  }
}

}  // namespace
#endif
