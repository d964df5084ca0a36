// A packed encoder's forward in one call: norms, int8 products, mixers, gates and residuals, document by document.
//
// Documents lie one behind another in x [rows, D], without padding, and go through all loops and layers in groups that
// are small enough for a core's caches. With at least as many groups as threads, each thread takes groups of its own;
// otherwise all threads share a group's rows and heads. Integer products are exact; all else is FP32, in another order
// of operations than PyTorch's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "fast_gemm.h"
#include "fast_memory.h"

#if TBF_GEMM
namespace {

constexpr int64_t kMaxSlices = 8;

struct Group {           // documents and the memory that their rows take on the way
  const int64_t* edges;  // [documents + 1] rows, from the group's first one
  int64_t documents, rows;
  bool amx;
  int threads;
  const HopeTables* hope;  // [H]
  Buffer quantised, scales, totals, strips, wide, narrow, update, normed, gates, state[4], extra, backward;
};

// `row` [cols], quantised to int8 [padded to 4]: scale and sum, as tbf_quantise_rows does.
inline void quantise(const float* row, int64_t cols, int8_t* out, float* scale, int32_t* total) {
  __m512i top = _mm512_setzero_si512();  // magnitudes as integers: Inf and NaN are on top
  const __m512i magnitudes = _mm512_set1_epi32(0x7fffffff);
  each(cols, [&](int64_t i, __mmask16 m) {
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(load(row + i, m)), magnitudes));
  });
  const int32_t bits = _mm512_reduce_max_epi32(top);
  float largest;
  std::memcpy(&largest, &bits, 4);
  const bool finite = std::isfinite(largest);
  largest = std::max(largest, 1e-5f);
  *scale = finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
  const __m512 inverse = all(finite ? 127.0f / largest : 0.0f);
  __m512i sum = _mm512_setzero_si512();
  each(cols, [&](int64_t i, __mmask16 m) {
    const __m512i v = _mm512_maskz_cvtps_epi32(finite ? m : 0, _mm512_mul_ps(load(row + i, m), inverse));
    sum = _mm512_add_epi32(sum, v);
    _mm_mask_storeu_epi8(out + i, m, _mm512_cvtepi32_epi8(v));
  });
  *total = _mm512_reduce_add_epi32(sum);
}

// out [rows, outer] = int8(fill's rows, normed where there is a gain) ternary(W)^T; fill(m, row) writes row m.
template <class Fill>
void linear(const Linear& w, Group& g, Fill&& fill, float* out) {
  const int64_t ld = ceil_div(w.inner, 4) * 4;
  int8_t* quantised = g.quantised.get<int8_t>(g.rows * ld);
  float* scales = g.scales.get(g.rows);
  int32_t* totals = g.totals.get<int32_t>(g.rows);
#pragma omp parallel for num_threads(g.threads) schedule(static)
  for (int64_t m = 0; m < g.rows; ++m) {
    float* row = scratch().row.get(w.inner);
    fill(m, row);
    if (w.gain) normed(row, w.inner, w.gain, w.eps, 1.0f, row);
    quantise(row, w.inner, quantised + m * ld, scales + m, totals + m);
  }
  Slice slices[kMaxSlices];
  for (int64_t s = 0, first = 0; s < w.slices; first += w.widths[s++])
    slices[s] = {w.quads[s], {1, totals, nullptr, scales, w.scales[s], out + first, w.outer, w.widths[s], false}};
#if TBF_AMX
  if (g.amx) {
    int8_t* strips = g.strips.get<int8_t>(ceil_div(g.rows, 32) * ceil_div(w.inner, kDeep) * kStripBytes);
    return gemm_quads_amx(quantised, g.rows, ld, w.inner, slices, w.slices, strips, g.threads);
  }
#endif
  gemm_quads(quantised, g.rows, ld, w.inner, slices, w.slices, g.threads);
}

inline void apply_norm(const Norm& norm, int64_t loop, const float* x, int64_t size, float* to) {
  const float *weight = norm.weight + loop * size, *bias = norm.bias ? norm.bias + loop * size : nullptr;
  if (norm.kind == kRms) return normed(x, size, weight, norm.eps, 1.0f, to);
  if (norm.kind == kLayerNorm) {
    __m512 sum = all(0), square = all(0);
    each(size, [&](int64_t i, __mmask16 m) { sum = _mm512_add_ps(sum, load(x + i, m)); });
    const __m512 mean = all(_mm512_reduce_add_ps(sum) / size);
    each(size, [&](int64_t i, __mmask16 m) {
      const __m512 v = _mm512_maskz_sub_ps(m, load(x + i, m), mean);
      square = _mm512_fmadd_ps(v, v, square);
    });
    const __m512 by = all(1.0f / std::sqrt(_mm512_reduce_add_ps(square) / size + norm.eps));
    each(size, [&](int64_t i, __mmask16 m) {
      const __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(x + i, m), mean), by);
      store(to + i, _mm512_fmadd_ps(v, load(weight + i, m), load(bias + i, m)), m);
    });
    return;
  }
  const __m512 alpha = all(norm.alpha[loop]), shift = all(norm.kind == kDerf ? norm.shift[loop] : 0.0f);
  each(size, [&](int64_t i, __mmask16 m) {
    const __m512 v = _mm512_fmadd_ps(alpha, load(x + i, m), shift);
    store(to + i, _mm512_fmadd_ps(load(weight + i, m), norm.kind == kDerf ? erf(v) : tanh(v), load(bias + i, m)), m);
  });
}

inline __m512 activate(int64_t kind, __m512 x) {
  if (kind == kSilu) return silu(x);
  if (kind == kGelu) return gelu(x);
  const __m512 positive = _mm512_max_ps(all(0), x);  // NaN stays
  return _mm512_mul_ps(positive, positive);
}

// to += by * update, all [count].
inline void add(const float* update, int64_t count, float by, float* to, int threads) {
  constexpr int64_t kSpan = 4096;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t at = 0; at < count; at += kSpan)
    each(std::min(kSpan, count - at), [&](int64_t i, __mmask16 m) {
      store(to + at + i, _mm512_fmadd_ps(load(update + at + i, m), all(by), load(to + at + i, m)), m);
    });
}

// Calls f(document's first row, its tokens, index) for every document and each of `count` heads or directions.
template <class F>
void each_head(const Group& g, int64_t count, F&& f) {
#pragma omp parallel for collapse(2) num_threads(g.threads) schedule(dynamic)
  for (int64_t d = 0; d < g.documents; ++d)
    for (int64_t h = 0; h < count; ++h) f(g.edges[d], g.edges[d + 1] - g.edges[d], h);
}

// Attention of all heads over projected rows [rows, 3 D] -> out [rows, D]. `gates`: of Titan's memory, or null.
void attend(const Model& model, const Layer& layer, const Group& g, const float* qkv, const float* gates, float* out) {
  const int64_t size = model.hidden, width = model.head_dim, ld = 3 * size;
  each_head(g, model.heads, [&](int64_t row, int64_t tokens, int64_t h) {
    const float* q = qkv + row * ld + h * width;
    const Head head{q, q + size, q + 2 * size, ld, tokens, width};
    float* to = out + row * size + h * width;
    if (layer.mixer == kTitan && model.hope)
      hope(model, layer, head, g.hope[h], to, size);
    else
      attention(model, layer, head, to, size);
    if (gates) titan_memory(model, layer, head, h, gates + row * 7 * model.heads, to, size);
  });
}

inline void copy_row(const float* from, int64_t size, float* to) { std::memcpy(to, from, size * sizeof(float)); }

// One evaluation of the ODE's field: z [rows, D] -> k [rows, D].
void field(const Model& model, const Layer& layer, Group& g, int64_t loop, int64_t stage, const float* z, float* k) {
  const int64_t size = model.hidden;
  float *qkv = g.wide.get(g.rows * 3 * size), *mixed = g.narrow.get(g.rows * size);
  const float *scale = layer.stage_scale + stage * size, *tau = layer.tau + loop * size;
  const auto fill = [&](int64_t m, float* row) {
    apply_norm(layer.mixer_norm, loop, z + m * size, size, row);
    each(size, [&](int64_t i, __mmask16 mask) {
      const __m512 v = load(row + i, mask);
      store(row + i, _mm512_fmadd_ps(v, load(scale + i, mask), v), mask);
    });
  };
  linear(layer.in, g, fill, qkv);
  attend(model, layer, g, qkv, nullptr, mixed);
  linear(layer.out, g, [&](int64_t m, float* row) { copy_row(mixed + m * size, size, row); }, k);
#pragma omp parallel for num_threads(g.threads) schedule(static)
  for (int64_t m = 0; m < g.rows; ++m) normed(k + m * size, size, tau, 1e-2f, 1.0f, k + m * size);
}

// update [rows, D] = z(1) - z(0) from z(0) = x, by the steps of tbf/ops/rk4.py.
void integrate(const Model& model, const Layer& layer, Group& g, int64_t loop, const float* x, float* update) {
  const int64_t count = g.rows * model.hidden;
  const float h = 1.0f / model.steps;
  float *z = g.state[0].get(count), *k = g.state[1].get(count), *start = g.state[2].get(count);
  const float ahead[] = {h / 2, h / 2, h, 0}, weight[] = {h / 6, h / 3, h / 3, h / 6};
  std::fill(update, update + count, 0.0f);
  for (int64_t step = 0; step < model.steps; ++step) {
    std::copy(x, x + count, start);
    if (step) add(update, count, 1.0f, start, g.threads);
    std::copy(start, start + count, z);
    for (int64_t stage = 0; stage < model.stages; ++stage) {
      field(model, layer, g, loop, stage, z, k);
      add(k, count, model.stages == 1 ? h : weight[stage], update, g.threads);
      if (stage + 1 == model.stages) break;
      std::copy(start, start + count, z);
      add(k, count, ahead[stage], z, g.threads);
    }
  }
}

void mamba_layer(const Model& model, const Layer& layer, Group& g, int64_t loop, const float* x, float* update) {
  const int64_t size = model.hidden, inner = model.inner, heads = model.mamba_heads, ld = layer.in.outer;
  const int64_t channels = inner + 4 * model.state, half = model.taps / 2;
  float *y = g.wide.get(g.rows * ld), *mixed = g.extra.get(g.rows * channels), *steps = g.gates.get(g.rows * 2 * heads);
  float *ahead = g.narrow.get(g.rows * inner), *behind = g.backward.get(g.rows * inner);
  linear(layer.in, g, [&](int64_t m, float* row) { apply_norm(layer.mixer_norm, loop, x + m * size, size, row); }, y);
  for (int64_t d = 0; d < g.documents; ++d) {
    const int64_t start = g.edges[d], end = g.edges[d + 1];
#pragma omp parallel for num_threads(g.threads) schedule(static)
    for (int64_t t = start; t < end; ++t) {
      const int64_t low = std::max(start, t - half), high = std::min(end, t + half + 1);
      each(channels, [&](int64_t c, __mmask16 m) {
        __m512 sum = load(layer.tap_bias + c, m);
        for (int64_t u = low; u < high; ++u)
          sum = _mm512_fmadd_ps(load(y + u * ld + inner + c, m), load(layer.taps + (u - t + half) * channels + c, m),
                                sum);
        store(mixed + t * channels + c, silu(sum), m);
      });
      for (int64_t direction = 0; direction < 2; ++direction)
        each(heads, [&](int64_t h, __mmask16 m) {
          const __m512 raw = load(y + t * ld + inner + channels + direction * heads + h, m);
          store(steps + (t * 2 + direction) * heads + h, softplus(_mm512_add_ps(raw, load(layer.step_bias + h, m))), m);
        });
    }
  }
  each_head(g, 2, [&](int64_t row, int64_t tokens, int64_t direction) {
    mamba(model, layer, mixed + row * channels, channels, steps + (row * 2 + direction) * heads, 2 * heads, tokens,
          direction == 1, (direction ? behind : ahead) + row * inner, inner);
  });
  const auto fill = [&](int64_t m, float* row) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t first = h * model.mamba_dim, at = m * inner + first;
      each(model.mamba_dim, [&](int64_t c, __mmask16 mask) {
        __m512 v = _mm512_add_ps(load(ahead + at + c, mask), load(behind + at + c, mask));
        v = _mm512_fmadd_ps(load(mixed + m * channels + first + c, mask), all(layer.skip[h]), v);
        store(row + first + c, _mm512_mul_ps(v, silu(load(y + m * ld + first + c, mask))), mask);
      });
    }
  };
  linear(layer.out, g, fill, update);
}

void retention_layer(const Model& model, const Layer& layer, Group& g, int64_t loop, const float* x, float* update) {
  const int64_t size = model.hidden, width = model.retention_dim, ld = 4 * size;
  float *y = g.wide.get(g.rows * ld), *mixed = g.narrow.get(g.rows * size);
  linear(layer.in, g, [&](int64_t m, float* row) { apply_norm(layer.mixer_norm, loop, x + m * size, size, row); }, y);
  each_head(g, model.retention_heads, [&](int64_t row, int64_t tokens, int64_t h) {
    const float* q = y + row * ld + h * width;
    retention(model, Head{q, q + size, q + 2 * size, ld, tokens, width}, model.log_gamma[h],
              mixed + row * size + h * width, size);
  });
  const auto fill = [&](int64_t m, float* row) {
    for (int64_t h = 0; h < model.retention_heads; ++h) {
      const float *from = mixed + m * size + h * width, *gate = y + m * ld + 3 * size + h * width;
      const __m512 by = all(inverse_rms(from, width, model.eps));
      each(width, [&](int64_t c, __mmask16 mask) {
        store(row + h * width + c, _mm512_mul_ps(_mm512_mul_ps(load(from + c, mask), by), silu(load(gate + c, mask))),
              mask);
      });
    }
  };
  linear(layer.out, g, fill, update);
}

void attention_layer(const Model& model, const Layer& layer, Group& g, int64_t loop, const float* x, float* update) {
  const int64_t size = model.hidden;
  float *qkv = g.wide.get(g.rows * 3 * size), *mixed = g.narrow.get(g.rows * size), *gates = nullptr;
  float* u = layer.gates ? g.normed.get(g.rows * size) : nullptr;
  const auto fill = [&](int64_t m, float* row) {
    apply_norm(layer.mixer_norm, loop, x + m * size, size, row);
    if (u) copy_row(row, size, u + m * size);
  };
  linear(layer.in, g, fill, qkv);
  if (layer.gates) {
    const int64_t count = 7 * model.heads;
    gates = g.gates.get(g.rows * count);
#pragma omp parallel for num_threads(g.threads) schedule(static)
    for (int64_t m = 0; m < g.rows; m += 6) {
      for (int64_t r = m; r < std::min(g.rows, m + 6); ++r) copy_row(layer.gate_bias, count, gates + r * count);
      multiply({u + m * size, size, 1}, layer.gates, count, gates + m * count, count, std::min<int64_t>(6, g.rows - m),
               count, size, true);
    }
  }
  attend(model, layer, g, qkv, gates, mixed);
  linear(layer.out, g, [&](int64_t m, float* row) { copy_row(mixed + m * size, size, row); }, update);
}

void feed_forward(const Model& model, const Layer& layer, Group& g, int64_t loop, const float* x, float* update) {
  const int64_t size = model.hidden, inner = layer.down.inner, ld = layer.up.outer;
  float* y = g.wide.get(g.rows * ld);
  linear(layer.up, g, [&](int64_t m, float* row) { apply_norm(layer.ffn_norm, loop, x + m * size, size, row); }, y);
  const auto fill = [&](int64_t m, float* row) {
    const float* from = y + m * ld;
    each(inner, [&](int64_t i, __mmask16 mask) {
      const __m512 v = activate(model.activation, load(from + i, mask));
      store(row + i, model.gated ? _mm512_mul_ps(v, load(from + inner + i, mask)) : v, mask);
    });
  };
  linear(layer.down, g, fill, update);
}

// x0 [rows, D] -> out [rows, D], the final norm included.
void encode(const Model& model, Group& g, int64_t loops, const float* x0, float* out) {
  const int64_t size = model.hidden, count = g.rows * size;
  float *x = g.state[3].get(count), *update = g.update.get(count);
  for (int64_t loop = 0; loop < loops; ++loop) {
    const int64_t row = std::min(loop, model.loops - 1);
    const float *inject = model.inject + row * size, *shift = model.shift + row * size;
#pragma omp parallel for num_threads(g.threads) schedule(static)
    for (int64_t m = 0; m < g.rows; ++m) {
      float* here = x + m * size;
      const __m512 by = all(loop ? inverse_rms(here, size, model.eps) : 0.0f);
      each(size, [&](int64_t i, __mmask16 mask) {
        __m512 v = _mm512_fmadd_ps(load(inject + i, mask), load(x0 + m * size + i, mask), load(shift + i, mask));
        if (loop) v = _mm512_fmadd_ps(load(here + i, mask), by, v);
        store(here + i, v, mask);
      });
    }
    for (int64_t l = 0; l < model.layers; ++l) {
      const Layer& layer = model.layer[l];
      const auto mixer = layer.mixer == kRetention ? retention_layer
                         : layer.mixer == kMamba   ? mamba_layer
                         : layer.mixer == kOde     ? integrate
                                                   : attention_layer;
      mixer(model, layer, g, row, x, update);
      add(update, count, 1.0f, x, g.threads);
      feed_forward(model, layer, g, row, x, update);
      add(update, count, 1.0f, x, g.threads);
    }
  }
#pragma omp parallel for num_threads(g.threads) schedule(static)
  for (int64_t m = 0; m < g.rows; ++m) normed(x + m * size, size, model.final_gain, model.eps, 1.0f, out + m * size);
}

Group& group_memory() {
  static thread_local Group mine;
  return mine;
}

}  // namespace
#endif

extern "C" {

int64_t tbf_fast_sizes(int64_t which) {  // for a test that the mirror in Python is in step
  const int64_t sizes[] = {sizeof(Linear), sizeof(Norm), sizeof(Layer), sizeof(Model)};
  return sizes[which];
}

#if TBF_AMX
int tbf_fast_serves(int amx) { return !amx || may_use_amx(); }
#elif TBF_GEMM
int tbf_fast_serves(int amx) { return !amx; }
#else
int tbf_fast_serves(int) { return 0; }
#endif

// out [rows, D] from x0 [rows, D]: documents [edges[d], edges[d + 1]) in groups of about `group_rows` rows. For where
// tbf_fast_serves says so.
void tbf_fast_encode(const Model* model, int64_t loops, const float* x0, const int64_t* edges, int64_t documents,
                     int64_t group_rows, int amx, float* out, int threads) {
#if TBF_GEMM
  const int64_t size = model->hidden, rows = edges[documents];
  int64_t most = kBlock;
  bool needs_hope = false;
  for (int64_t d = 0; d < documents; ++d) most = std::max(most, edges[d + 1] - edges[d]);
  for (int64_t l = 0; l < model->layers; ++l) needs_hope |= model->hope && model->layer[l].mixer == kTitan;
  Buffer memory;
  std::vector<HopeTables> tables;
  if (needs_hope) {
    const int64_t each_size = HopeTables::size(model->head_dim, most);
    float* at = memory.get(model->heads * each_size);
    for (int64_t h = 0; h < model->heads; ++h) tables.emplace_back(at + h * each_size, model->head_dim, most);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t h = 0; h < model->heads; ++h)
      tables[h].fill(model->theta + h * model->head_dim / 2, model->theta_prime[h], model->head_dim);
  }
  std::vector<int64_t> first{0};  // first document of each group
  const int64_t target = std::max<int64_t>(1, std::min(group_rows, ceil_div(rows, threads)));
  for (int64_t d = 0; d < documents; ++d)
    if (edges[d + 1] - edges[first.back()] > target && d > first.back()) first.push_back(d);
  const int64_t groups = first.size();
  first.push_back(documents);
  const bool apart = groups >= threads;
  const auto run = [&](int64_t i, int inside) {
    Group& g = group_memory();
    std::vector<int64_t> mine(edges + first[i], edges + first[i + 1] + 1);
    const int64_t start = mine[0];
    for (int64_t& edge : mine) edge -= start;
    g.edges = mine.data(), g.documents = first[i + 1] - first[i], g.rows = mine.back();
    g.amx = amx != 0, g.threads = inside, g.hope = tables.data();
    encode(*model, g, loops, x0 + start * size, out + start * size);
  };
  if (apart) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < groups; ++i) run(i, 1);
  } else {
    for (int64_t i = 0; i < groups; ++i) run(i, threads);
  }
#else
  (void)model, (void)loops, (void)x0, (void)edges, (void)documents, (void)group_rows, (void)amx, (void)out,
      (void)threads;
#endif
}

}  // extern "C"
