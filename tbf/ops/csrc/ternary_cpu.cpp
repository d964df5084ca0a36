// Ternary weights and int8 activations on x86-64 and other hosts: quantisers, packers and one int8 GEMM.
//
// Plain C ABI, no torch headers: it builds in seconds and is called through ctypes. Every function takes the number of
// threads. The quantisers are ordinary loops that the compiler vectorises; only the GEMM is written in intrinsics, and
// only for AVX512-VNNI and for AMX (tbf_has_gemm and tbf_has_amx say whether they can serve).
//
// Shapes: M rows (tokens), N output features, D input features, K the inner dimension of a GEMM, all counted in
// elements. "Four-groups" are 4 neighbours along K, which one VNNI instruction multiplies and adds: K4 = ceil(K / 4).
//
//   panels  [R/16][K4][16][4]  unsigned bytes, value + zero point: right operand of the GEMM, padded with raw zeros, so
//                              that whatever the left operand holds there doesn't count
//   tiles   [R/T][K4][8][4]    signed bytes: left operand of the weight gradient, T = 8 rows, or 4 rows of the high
//                              parts followed by the same 4 rows of the low parts
//
// Rounding is half to even (the default of the floating-point unit). A row or column that holds NaN or Inf gets the
// scale NaN, which the GEMM's epilogue carries into every product that row or column takes part in.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "ternary_amx.h"
#include "ternary_gemm.h"

namespace {

constexpr int64_t kStageRows = 64;
constexpr int32_t kInfinity = 0x7f800000;

#ifdef _OPENMP
int thread_index() { return omp_get_thread_num(); }
#else
int thread_index() { return 0; }
#endif

int32_t magnitude(float v) {  // orders like |v|, with Inf and NaN on top
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits & 0x7fffffff;
}

float from_bits(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

struct Scale {
  float value;    // what one step is worth
  float inverse;  // steps per unit
};

Scale scale_of(int32_t largest, float eps) {
  if (largest >= kInfinity) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  const float clamped = std::max(from_bits(largest), eps);
  return {clamped / 127.0f, 127.0f / clamped};
}

uint32_t add_bytes(uint32_t four, int value) {  // adds to each of 4 bytes, without carries between them
  const uint32_t all = static_cast<uint32_t>(value) * 0x01010101u;
  return ((four & 0x7f7f7f7fu) + (all & 0x7f7f7f7fu)) ^ ((four ^ all) & 0x80808080u);
}

uint32_t join(int32_t a, int32_t b, int32_t c, int32_t d) {  // the low bytes of four numbers
  return static_cast<uint32_t>(a & 255) | static_cast<uint32_t>(b & 255) << 8 | static_cast<uint32_t>(c & 255) << 16 |
         static_cast<uint32_t>(d & 255) << 24;
}

int32_t largest_of(const float* x, int64_t count, float factor) {
  int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t n = 0; n < count; ++n) largest = std::max(largest, magnitude(x[n] * factor));
  return largest;
}

void raise_to(const float* x, int64_t count, float factor, int32_t* largest) {
#pragma omp simd
  for (int64_t n = 0; n < count; ++n) {
    const int32_t here = magnitude(x[n] * factor), top = largest[n];
    largest[n] = here > top ? here : top;
  }
}

// Quantises part of a gradient's row and adds to the row's sums.
template <bool LOW>
void row_bytes(const float* x, int64_t count, float factor, float inverse, int8_t* high, int8_t* low, int32_t* high_sum,
               int32_t* low_sum) {
  int32_t high_total = 0, low_total = 0;
#pragma omp simd reduction(+ : high_total, low_total)
  for (int64_t n = 0; n < count; ++n) {
    const float t = x[n] * factor * inverse, h = std::rint(t);
    high[n] = static_cast<int8_t>(static_cast<int32_t>(h));
    high_total += static_cast<int32_t>(h);
    if (LOW) {
      const int32_t rest = static_cast<int32_t>(std::rint((t - h) * kLowStep));
      low[n] = static_cast<int8_t>(rest);
      low_total += rest;
    }
  }
  *high_sum += high_total;
  if (LOW) *low_sum += low_total;
}

// Quantises 4 rows of a gradient along their columns; each word joins a column's 4 values.
template <bool LOW>
void column_words(const float* const* from, const float* factor, const float* inverse, int64_t columns, uint32_t* high,
                  uint32_t* low, int32_t* high_sum, int32_t* low_sum) {
  const float *x0 = from[0], *x1 = from[1], *x2 = from[2], *x3 = from[3];
  const float f0 = factor[0], f1 = factor[1], f2 = factor[2], f3 = factor[3];
#pragma omp simd
  for (int64_t n = 0; n < columns; ++n) {
    const float t0 = x0[n] * f0 * inverse[n], t1 = x1[n] * f1 * inverse[n];
    const float t2 = x2[n] * f2 * inverse[n], t3 = x3[n] * f3 * inverse[n];
    const float h0 = std::rint(t0), h1 = std::rint(t1), h2 = std::rint(t2), h3 = std::rint(t3);
    const int32_t i0 = h0, i1 = h1, i2 = h2, i3 = h3;
    high[n] = join(i0, i1, i2, i3);
    high_sum[n] += i0 + i1 + i2 + i3;
    if (LOW) {
      const int32_t l0 = std::rint((t0 - h0) * kLowStep), l1 = std::rint((t1 - h1) * kLowStep);
      const int32_t l2 = std::rint((t2 - h2) * kLowStep), l3 = std::rint((t3 - h3) * kLowStep);
      low[n] = join(l0, l1, l2, l3);
      low_sum[n] += l0 + l1 + l2 + l3;
    }
  }
}

// Quantises one row of a gradient along its columns.
template <bool LOW>
void column_bytes(const float* x, int64_t count, float factor, const float* inverse, int8_t* high, int8_t* low) {
#pragma omp simd
  for (int64_t n = 0; n < count; ++n) {
    const float t = x[n] * factor * inverse[n], h = std::rint(t);
    high[n] = static_cast<int8_t>(static_cast<int32_t>(h));
    if (LOW) low[n] = static_cast<int8_t>(static_cast<int32_t>(std::rint((t - h) * kLowStep)));
  }
}

// Quantises `rows` rows (at most kStageRows) of a gradient along their columns into tiles. Each tile's bytes gather in a
// small buffer first: tiles tend to lie a power of two apart in memory, where their lines would evict each other.
template <bool LOW>
void fill_tiles(const float* x, int64_t ld, int64_t rows, int64_t columns, const float* factor, const float* inverse,
                int64_t n0, int64_t group0, int64_t groups, int8_t* tiles, int32_t* high_sum, int32_t* low_sum) {
  constexpr int64_t kTileRows = LOW ? 4 : 8, kColumns = 64;
  int8_t stage[kColumns / kTileRows][kStageRows / 4][32];
  uint32_t high[kColumns], low[kColumns];
  const int64_t here = ceil_div(rows, 4);
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t span = std::min(kColumns, columns - c);
    const bool aligned = (n0 + c) % kTileRows == 0 && span % kTileRows == 0;
    for (int64_t g = 0; g < here; ++g) {
      const float* from[4];
      float by[4];
      for (int64_t r = 0; r < 4; ++r) {  // a missing row counts as zeros
        const int64_t m = std::min(g * 4 + r, rows - 1);
        from[r] = x + m * ld + c;
        by[r] = g * 4 + r >= rows ? 0.0f : factor ? factor[m] : 1.0f;
      }
      column_words<LOW>(from, by, inverse + c, span, high, low, high_sum + c, low_sum + c);
      for (int64_t n = 0; aligned && n < span; n += kTileRows) {
        std::memcpy(stage[n / kTileRows][g], high + n, 16);
        std::memcpy(stage[n / kTileRows][g] + 16, LOW ? low + n : high + n + 4, 16);
      }
      for (int64_t n = 0; !aligned && n < span; ++n) {
        const int64_t at = n0 + c + n;
        int8_t* to = tiles + (at / kTileRows * groups + group0 + g) * 32 + at % kTileRows * 4;
        std::memcpy(to, high + n, 4);
        if (LOW) std::memcpy(to + 16, low + n, 4);
      }
    }
    for (int64_t n = 0; aligned && n < span; n += kTileRows)
      std::memcpy(tiles + ((n0 + c + n) / kTileRows * groups + group0) * 32, stage[n / kTileRows], here * 32);
  }
}

}  // namespace

extern "C" {

int tbf_has_gemm() { return TBF_GEMM; }

#if TBF_AMX
int tbf_has_amx() { return may_use_amx(); }
#else
int tbf_has_amx() { return 0; }
#endif

#ifdef _OPENMP
int tbf_has_threads() { return 1; }
#else
int tbf_has_threads() { return 0; }
#endif

// Quantises rows: q [M, ldq] int8, scale [M], sum [M] of the quantised values. With `gain` [D], quantises
// RMSNorm(x) * gain instead and writes 1/rms to `rrms` [M].
void tbf_quantise_rows(const float* x, int64_t rows, int64_t cols, int64_t ldx, float eps, const float* gain,
                       double norm_eps, int8_t* q, int64_t ldq, float* scale, int32_t* sum, float* rrms, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> normed(gain ? cols : 0);
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; ++m) {
      const float* row = x + m * ldx;
      if (gain) {
        double squares = 0.0;  // FP64: the sum's order must not decide a rounding
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < cols; ++d) squares += static_cast<double>(row[d]) * row[d];
        const float r = static_cast<float>(1.0 / std::sqrt(squares / cols + norm_eps));
        float* out = normed.data();
#pragma omp simd
        for (int64_t d = 0; d < cols; ++d) out[d] = row[d] * r * gain[d];
        rrms[m] = r;
        row = out;
      }
      const Scale s = scale_of(largest_of(row, cols, 1.0f), eps);
      int8_t* out = q + m * ldq;
      int32_t total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t d = 0; d < cols; ++d) {
        const int32_t v = static_cast<int32_t>(std::rint(row[d] * s.inverse));
        out[d] = static_cast<int8_t>(v);
        total += static_cast<int8_t>(v);
      }
      scale[m] = s.value;
      sum[m] = total;
    }
  }
}

// Gradients of RMSNorm(x) * gain: dx [M, D], and dgain [D], which is overwritten.
void tbf_rms_norm_backward(const float* dy, const float* x, int64_t rows, int64_t cols, int64_t ldx, const float* gain,
                           const float* rrms, float* dx, float* dgain, int threads) {
  std::vector<float> partial(static_cast<size_t>(threads) * cols, 0.0f);
#pragma omp parallel num_threads(threads)
  {
    float* mine = partial.data() + thread_index() * cols;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; ++m) {
      const float *g = dy + m * cols, *row = x + m * ldx;
      const float r = rrms[m];
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < cols; ++d) dot += g[d] * gain[d] * row[d];
      const float shrink = dot * r * r * r / cols;
      float* out = dx + m * cols;
#pragma omp simd
      for (int64_t d = 0; d < cols; ++d) {
        out[d] = g[d] * gain[d] * r - row[d] * shrink;
        mine[d] += g[d] * row[d] * r;
      }
    }
  }
  std::memset(dgain, 0, cols * sizeof(float));
  for (int t = 0; t < threads; ++t)
    for (int64_t d = 0; d < cols; ++d) dgain[d] += partial[t * cols + d];
}

// Ternarises w [N, D] with one scale: q int8 [N, D], scale [1]. The FP64 sum runs row by row, so that it doesn't depend
// on the number of threads.
void tbf_ternarise(const float* w, int64_t rows, int64_t cols, double eps, int8_t* q, float* scale, int threads) {
  std::vector<double> sums(rows);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < cols; ++d) total += std::fabs(w[n * cols + d]);
    sums[n] = total;
  }
  double mean = 0.0;
  for (double s : sums) mean += s;
  mean /= static_cast<double>(rows) * cols;
  const bool finite = std::isfinite(mean);
  if (mean < eps) mean = eps;
  const float inverse = finite ? static_cast<float>(1.0 / mean) : 0.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = w + i * cols;
    int8_t* out = q + i * cols;
    for (int64_t d = 0; d < cols; ++d) {  // rounding half to even, then clipping to -1..1
      const float steps = row[d] * inverse;
      out[d] = static_cast<int8_t>((steps > 0.5f) - (steps < -0.5f));
    }
  }
  *scale = finite ? static_cast<float>(mean) : std::numeric_limits<float>::quiet_NaN();
}

// Packs q [R, K] (rows `ldq` apart, K neighbours in memory) into panels over R.
void tbf_pack_rows(const int8_t* q, int64_t rows, int64_t inner, int64_t ldq, int zero_point, uint8_t* panels,
                   int threads) {
  const int64_t groups = ceil_div(inner, 4);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < ceil_div(rows, kPanel); ++p) {
    uint8_t* out = panels + p * groups * 4 * kPanel;
    std::memset(out, 0, groups * 4 * kPanel);
    for (int64_t r = 0; r < std::min(kPanel, rows - p * kPanel); ++r) {
      const int8_t* row = q + (p * kPanel + r) * ldq;
      uint8_t* to = out + r * 4;
      for (int64_t g = 0; g < inner / 4; ++g, to += 4 * kPanel) {
        uint32_t word;
        std::memcpy(&word, row + g * 4, 4);
        word = add_bytes(word, zero_point);
        std::memcpy(to, &word, 4);
      }
      for (int64_t k = inner / 4 * 4; k < inner; ++k) *to++ = static_cast<uint8_t>(row[k] + zero_point);
    }
  }
}

// Packs q [K, R] (K rows `ldq` apart) into panels over R.
void tbf_pack_columns(const int8_t* q, int64_t inner, int64_t rows, int64_t ldq, int zero_point, uint8_t* panels,
                      int threads) {
  const int64_t groups = ceil_div(inner, 4), count = ceil_div(rows, kPanel);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> buffer(count * kPanel, 0);
    uint32_t* words = buffer.data();
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t here = std::min<int64_t>(4, inner - g * 4);
      const int8_t* r[4];
      for (int64_t i = 0; i < 4; ++i) r[i] = q + (g * 4 + std::min(i, here - 1)) * ldq;
      const int8_t *r0 = r[0], *r1 = r[1], *r2 = r[2], *r3 = r[3];
      const uint32_t keep = 0xffffffffu >> (8 * (4 - here));
#pragma omp simd
      for (int64_t n = 0; n < rows; ++n)
        words[n] = join(r0[n] + zero_point, r1[n] + zero_point, r2[n] + zero_point, r3[n] + zero_point) & keep;
      for (int64_t p = 0; p < count; ++p)
        std::memcpy(panels + (p * groups + g) * 4 * kPanel, words + p * kPanel, 4 * kPanel);
    }
  }
}

// Turns a gradient into int8, along rows, along columns, or along both with two readings of it.
//
// The gradient is `slices` matrices side by side, slice i [M, width[i]] with rows ld[i] apart; N is the sum of widths.
//   rows     of  dy[m, n] * slice_scale[i]: for dX = dY (scale Wq)
//   columns  of  dy[m, n] * row_factor[m]:  for dW = (dY factor)^T Xq
// x ~ scale * high, or scale * (high + low / 254) when the low outputs are given.
//
// row_high, row_low [M, ldr]; row_scale, row_sum, row_low_sum [M]. row_high null: no row quantisation.
// column_high, column_low [M, N], or with `tiled` column_high holds tiles of both; column_scale [N]; column_sum,
// column_low_sum [N], only with `tiled`. column_high null: no column quantisation.
void tbf_quantise_gradient(const float* const* dy, const int64_t* width, const int64_t* ld, const float* slice_scale,
                           int slices, int64_t rows, const float* row_factor, float eps, int low, int8_t* row_high,
                           int8_t* row_low, int64_t ldr, float* row_scale, int32_t* row_sum, int32_t* row_low_sum,
                           int8_t* column_high, int8_t* column_low, int tiled, float* column_scale,
                           int32_t* column_sum, int32_t* column_low_sum, int threads) {
  constexpr int64_t kColumns = 512;  // with kStageRows, what a second-level cache holds
  int64_t total = 0;
  for (int i = 0; i < slices; ++i) total += width[i];
  const int64_t groups = ceil_div(rows, 4), tile_rows = low ? 4 : 8, blocks = ceil_div(rows, kStageRows);
  std::vector<int32_t> column_largest(static_cast<size_t>(threads) * total, 0);
  std::vector<int32_t> sums(static_cast<size_t>(threads) * total * 2, 0);
  std::vector<float> row_inverse(rows), column_inverse(total);
  if (column_high && tiled)  // the last tile's missing rows
    std::memset(column_high + (total / tile_rows) * groups * 32, 0,
                (ceil_div(total, tile_rows) - total / tile_rows) * groups * 32);
#pragma omp parallel num_threads(threads)
  {
    int32_t* largest = column_largest.data() + thread_index() * total;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; ++m) {
      int32_t row_largest = 0;
      const float factor = row_factor ? row_factor[m] : 1.0f;
      int64_t first = 0;
      for (int i = 0; i < slices; first += width[i++]) {
        const float* row = dy[i] + m * ld[i];
        if (row_high) row_largest = std::max(row_largest, largest_of(row, width[i], slice_scale[i]));
        if (column_high) raise_to(row, width[i], factor, largest + first);
      }
      if (row_high) {
        const Scale s = scale_of(row_largest, eps);
        row_scale[m] = s.value;
        row_inverse[m] = s.inverse;
        row_sum[m] = 0;
        if (low) row_low_sum[m] = 0;
      }
    }
    if (column_high) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < total; ++n) {
        int32_t top = 0;
        for (int t = 0; t < threads; ++t) top = std::max(top, column_largest[t * total + n]);
        const Scale s = scale_of(top, eps);
        column_scale[n] = s.value;
        column_inverse[n] = s.inverse;
      }
    }
    int32_t* high_sum = sums.data() + thread_index() * total * 2;
    int32_t* low_sum = high_sum + total;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t m0 = block * kStageRows, here = std::min(kStageRows, rows - m0);
      const float* factor = row_factor ? row_factor + m0 : nullptr;
      int64_t first = 0;
      for (int i = 0; i < slices; first += width[i++]) {
        for (int64_t c = 0; c < width[i]; c += kColumns) {
          const int64_t columns = std::min(kColumns, width[i] - c), n0 = first + c;
          const float *x = dy[i] + m0 * ld[i] + c, *inverse = column_inverse.data() + n0;
          for (int64_t r = 0; row_high && r < here; ++r) {
            const int64_t m = m0 + r, at = m * ldr + n0;
            if (low)
              row_bytes<true>(x + r * ld[i], columns, slice_scale[i], row_inverse[m], row_high + at, row_low + at,
                              row_sum + m, row_low_sum + m);
            else
              row_bytes<false>(x + r * ld[i], columns, slice_scale[i], row_inverse[m], row_high + at, nullptr,
                               row_sum + m, nullptr);
          }
          if (!column_high) continue;
          if (tiled) {
            (low ? fill_tiles<true> : fill_tiles<false>)(x, ld[i], here, columns, factor, inverse, n0, m0 / 4, groups,
                                                         column_high, high_sum + n0, low_sum + n0);
            continue;
          }
          for (int64_t r = 0; r < here; ++r) {
            const int64_t at = (m0 + r) * total + n0;
            (low ? column_bytes<true> : column_bytes<false>)(x + r * ld[i], columns, factor ? factor[r] : 1.0f, inverse,
                                                             column_high + at, low ? column_low + at : nullptr);
          }
        }
      }
    }
    if (column_high && tiled) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < total; ++n) {
        int32_t high_total = 0, low_total = 0;
        for (int t = 0; t < threads; ++t) {
          high_total += sums[t * total * 2 + n];
          low_total += sums[(t * 2 + 1) * total + n];
        }
        column_sum[n] = high_total;
        if (low) column_low_sum[n] = low_total;
      }
    }
  }
}

// Scales integer products: out [M, N] = (high + low / 254) * row_scale[m] * scale. `low` may be null.
void tbf_scale_products(const int32_t* high, const int32_t* low, int64_t rows, int64_t cols, const float* row_scale,
                        const float* scale, float* out, int64_t ldo, int threads) {
  const float s = *scale;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t m = 0; m < rows; ++m) {
    const float r = row_scale[m];
    const int32_t *h = high + m * cols, *l = low ? low + m * cols : nullptr;
    float* to = out + m * ldo;
    if (l)
      for (int64_t n = 0; n < cols; ++n)
        to[n] = (static_cast<float>(h[n]) + static_cast<float>(l[n]) * (1.0f / kLowStep)) * r * s;
    else
      for (int64_t n = 0; n < cols; ++n) to[n] = static_cast<float>(h[n]) * r * s;
  }
}

// out [M, N] = left right^T, scaled: (products of high + products of low / 254) * row_scale[m] * scale.
//
// left: high, low int8 [M, ldl] (ldl at least 4 ceil(K / 4)), or tiles when `tiled`; `low` is null for one part (tiles
// hold both parts, then `low` only has to be non-null). sum, low_sum [M]: row sums of left, which undo the zero point.
// right: panels over N, with 960 readable bytes behind them for AMX. `amx`: in AMX tiles, where
// tbf_has_amx says so. Returns 0, or 1 when this build holds no GEMM.
int tbf_gemm(const int8_t* high, const int8_t* low, int tiled, int64_t rows, int64_t ldl, const uint8_t* right,
             int64_t cols, int64_t inner, int zero_point, const int32_t* sum, const int32_t* low_sum,
             const float* row_scale, const float* scale, float* out, int64_t ldo, int amx, int threads) {
#if TBF_GEMM
  const Epilogue e{zero_point, sum, low_sum, row_scale, *scale, out, ldo, cols, rows * cols * 4 > kStreamBytes};
#if TBF_AMX
  if (amx && inner > 0) {
    (low ? gemm_amx<true> : gemm_amx<false>)(high, low, tiled != 0, rows, ldl, right, inner, e, threads);
    return 0;
  }
#endif
  (low ? gemm<true> : gemm<false>)(high, low, tiled != 0, rows, ldl, right, inner, e, threads);
  return 0;
#else
  (void)high, (void)low, (void)tiled, (void)rows, (void)ldl, (void)right, (void)cols, (void)inner, (void)zero_point;
  (void)sum, (void)low_sum, (void)row_scale, (void)scale, (void)out, (void)ldo, (void)amx, (void)threads;
  return 1;
#endif
}

}  // extern "C"
