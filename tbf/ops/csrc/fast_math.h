// Point-wise functions and small FP32 products in AVX512 for the fused encoder (fast_encoder.cpp).
//
// Rows may have any length: the last vector of each is masked. Relative errors are a few 1e-7, as those of the FP32
// sums around them; results don't depend on the number of threads.

#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "ternary_amx.h"

#if TBF_GEMM
namespace {

constexpr int64_t kLanes = 16;

__mmask16 lanes(int64_t left) { return left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }
int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }

inline __m512 load(const float* x, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, x); }
inline void store(float* x, __m512 v, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(x, mask, v); }
inline __m512 all(float v) { return _mm512_set1_ps(v); }

// Calls f(first element, mask) for each vector of a row.
template <class F>
inline void each(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, static_cast<__mmask16>(0xffff));
  if (i < n) f(i, lanes(n - i));
}

inline __m512 exp(__m512 x) {  // 0 below -104, never infinite; NaN stays, as the second operand
  x = _mm512_min_ps(all(88.7f), _mm512_max_ps(all(-110.0f), x));
  const __m512 n =
      _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, all(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), r);
  __m512 p = all(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, all(c));
  return _mm512_scalef_ps(p, n);
}

inline __m512 magnitude(__m512 x) { return _mm512_abs_ps(x); }
inline __m512 with_sign_of(__m512 x, __m512 sign) {
  const __m512i bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(x), _mm512_and_si512(_mm512_castps_si512(sign), bit)));
}

inline __m512 sigmoid(__m512 x) { return _mm512_div_ps(all(1), _mm512_add_ps(all(1), exp(_mm512_sub_ps(all(0), x)))); }
inline __m512 silu(__m512 x) { return _mm512_div_ps(x, _mm512_add_ps(all(1), exp(_mm512_sub_ps(all(0), x)))); }

inline __m512 tanh(__m512 x) {
  const __m512 e = exp(_mm512_mul_ps(all(-2), magnitude(x)));
  return with_sign_of(_mm512_div_ps(_mm512_sub_ps(all(1), e), _mm512_add_ps(all(1), e)), x);
}

inline __m512 erf(__m512 x) {  // Abramowitz & Stegun 7.1.26, off by at most 1.5e-7
  const __m512 a = magnitude(x), t = _mm512_div_ps(all(1), _mm512_fmadd_ps(a, all(0.3275911f), all(1)));
  __m512 p = all(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = _mm512_fmadd_ps(p, t, all(c));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), exp(_mm512_sub_ps(all(0), _mm512_mul_ps(a, a))));
  return with_sign_of(_mm512_sub_ps(all(1), tail), x);
}

inline __m512 gelu(__m512 x) {
  return _mm512_mul_ps(_mm512_mul_ps(all(0.5f), x), _mm512_add_ps(all(1), erf(_mm512_mul_ps(x, all(0.707106781f)))));
}

inline __m512 softplus(__m512 x) {  // max(x, 0) + log1p(z) with z = exp(-|x|), log1p(z) = 2 artanh(z / (2 + z))
  const __m512 z = exp(_mm512_sub_ps(all(0), magnitude(x)));
  const __m512 s = _mm512_div_ps(z, _mm512_add_ps(all(2), z)), square = _mm512_mul_ps(s, s);
  __m512 p = all(2.0f / 15);
  for (float c : {2.0f / 13, 2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f})
    p = _mm512_fmadd_ps(p, square, all(c));
  return _mm512_fmadd_ps(p, s, _mm512_max_ps(x, all(0)));
}

inline float sum_of_squares(const float* x, int64_t n) {
  __m512 total = all(0);
  each(n, [&](int64_t i, __mmask16 m) {
    const __m512 v = load(x + i, m);
    total = _mm512_fmadd_ps(v, v, total);
  });
  return _mm512_reduce_add_ps(total);
}

inline float inverse_rms(const float* x, int64_t n, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, n) / n + eps);
}

// Memory that only grows, one per purpose and thread.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  template <class T = float>
  T* get(int64_t count) {
    const int64_t bytes = ceil_div(count * static_cast<int64_t>(sizeof(T)) + 64, 64) * 64;
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      memory_ = std::aligned_alloc(64, bytes);
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

struct Scratch {  // of one thread
  Buffer query, key, scores, other, factors, state, states, values, work, row, panels;
};

inline Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

struct Matrix {  // rows and columns may lie any distance apart, and run backwards
  const float* at;
  int64_t row, column;
};

template <int R, int V>
inline void multiply_block(const Matrix& a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t inner,
                           __mmask16 last, bool add) {
  __m512 sums[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j)
      sums[i][j] = add ? load(c + i * ldc + j * kLanes, j == V - 1 ? last : 0xffff) : _mm512_setzero_ps();
  const float* left = a.at;
  for (int64_t k = 0; k < inner; ++k, b += ldb, left += a.column) {
    __m512 right[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) right[j] = load(b + j * kLanes, j == V - 1 ? last : 0xffff);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m512 value = all(left[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = _mm512_fmadd_ps(value, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) store(c + i * ldc + j * kLanes, sums[i][j], j == V - 1 ? last : 0xffff);
}

template <int R, int V>
inline void multiply_rows(const Matrix& a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                          int64_t inner, __mmask16 last, bool add) {  // rows: at most R
  if (rows == R) {
    multiply_block<R, V>(a, b, ldb, c, ldc, inner, last, add);
  } else if constexpr (R > 1) {
    multiply_rows<R - 1, V>(a, b, ldb, c, ldc, rows, inner, last, add);
  }
}

template <int V>
inline void multiply_columns(Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t inner,
                             __mmask16 last, bool add) {
  for (; rows >= 6; rows -= 6, a.at += 6 * a.row, c += 6 * ldc)
    multiply_block<6, V>(a, b, ldb, c, ldc, inner, last, add);
  multiply_rows<5, V>(a, b, ldb, c, ldc, rows, inner, last, add);
}

// c [rows, cols] = a [rows, inner] b [inner, cols], or += with `add`. The columns of b and c are neighbours.
inline void multiply(Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t cols,
                     int64_t inner, bool add = false) {
  for (int64_t n = 0; n < cols; n += 4 * kLanes, b += 4 * kLanes, c += 4 * kLanes) {
    const int64_t left = cols - n;
    const __mmask16 last = left >= 4 * kLanes ? 0xffff : lanes(left - (ceil_div(left, kLanes) - 1) * kLanes);
    switch (std::min<int64_t>(4, ceil_div(left, kLanes))) {
      case 4:
        multiply_columns<4>(a, b, ldb, c, ldc, rows, inner, last, add);
        break;
      case 3:
        multiply_columns<3>(a, b, ldb, c, ldc, rows, inner, last, add);
        break;
      case 2:
        multiply_columns<2>(a, b, ldb, c, ldc, rows, inner, last, add);
        break;
      default:
        multiply_columns<1>(a, b, ldb, c, ldc, rows, inner, last, add);
    }
  }
}

}  // namespace
#endif
