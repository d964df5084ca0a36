// Integer products of the fused encoder with weights of two bits, which are unpacked for one block of columns at a
// time.
//
// A core can multiply faster than it can fetch bytes from beyond its own caches: with few rows, all the time of a
// product is the reading of the weights. Right operand: quads [panels][Q][64] with Q = ceil(K / 16): byte i of quad q
// holds byte i of the four 64-byte rows 4 q .. 4 q + 3 of a panel (ternary_cpu.cpp), two bits each, the first row
// lowest. Left operand and results are those of ternary_gemm.h and ternary_amx.h.

#pragma once

#include "fast_math.h"

#if TBF_GEMM
namespace {

constexpr int64_t kRowBytes = 4 * kPanel;

int64_t quads_of(int64_t inner) { return ceil_div(inner, 4 * 4); }

inline void unpack_panel(const uint8_t* quads, int64_t count, uint8_t* panel) {
  const __m512i lowest = _mm512_set1_epi8(3);
  for (int64_t q = 0; q < count; ++q, quads += kRowBytes, panel += 4 * kRowBytes) {
    const __m512i four = _mm512_loadu_si512(quads);
    _mm512_storeu_si512(panel, _mm512_and_si512(four, lowest));
    _mm512_storeu_si512(panel + kRowBytes, _mm512_and_si512(_mm512_srli_epi16(four, 2), lowest));
    _mm512_storeu_si512(panel + 2 * kRowBytes, _mm512_and_si512(_mm512_srli_epi16(four, 4), lowest));
    _mm512_storeu_si512(panel + 3 * kRowBytes, _mm512_and_si512(_mm512_srli_epi16(four, 6), lowest));
  }
}

struct Slice {  // output columns that share a scale
  const uint8_t* quads;
  Epilogue epilogue;
};

// Panels first..first + W of a slice for all rows: left [rows, ld].
template <int W>
void multiply_panels(const int8_t* left, int64_t rows, int64_t ld, const uint8_t* panels, int64_t stride,
                     int64_t groups, int64_t first, const Epilogue& e) {
  for (int64_t m0 = 0; m0 < rows; m0 += kTile) {
    const int64_t here = std::min<int64_t>(kTile, rows - m0);
    const int8_t* from[kTile];
    for (int64_t i = 0; i < kTile; ++i) from[i] = left + (m0 + std::min(i, here - 1)) * ld;
    multiply_tile<W, false>(from, 4, panels, stride, groups, m0, here, first * kPanel, e);
  }
}

// left int8 [rows, ld] times the slices.
inline void gemm_quads(const int8_t* left, int64_t rows, int64_t ld, int64_t inner, const Slice* slices, int64_t count,
                       int threads) {
  const int64_t groups = ceil_div(inner, 4), quads = quads_of(inner), stride = quads * 4 * kRowBytes;
#pragma omp parallel num_threads(threads)
  {
    uint8_t* panels = scratch().panels.get<uint8_t>(kWide * stride);
    for (int64_t s = 0; s < count; ++s) {
      const Epilogue& e = slices[s].epilogue;
      const int64_t all_panels = ceil_div(e.cols, kPanel);
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < all_panels; p += kWide) {
        const int64_t here = std::min<int64_t>(kWide, all_panels - p);
        for (int64_t i = 0; i < here; ++i)
          unpack_panel(slices[s].quads + (p + i) * quads * kRowBytes, quads, panels + i * stride);
        switch (here) {
          case 3:
            multiply_panels<3>(left, rows, ld, panels, stride, groups, p, e);
            break;
          case 2:
            multiply_panels<2>(left, rows, ld, panels, stride, groups, p, e);
            break;
          default:
            multiply_panels<1>(left, rows, ld, panels, stride, groups, p, e);
        }
      }
    }
  }
}

#if TBF_AMX
constexpr int64_t kDeepBlock = 16;   // tiles of two panels that fit in the first-level cache
constexpr int64_t kStripBlock = 16;  // strips whose sums wait for the next block

// The sums of a strip and two panels, scaled, to rows m0.. and columns n0.. of the output.
inline void scale_strip(const int32_t* sums, int64_t m0, int64_t rows, int64_t n0, const Epilogue& e) {
  const __m512 scale = all(e.scale);
  const int64_t left = e.cols - n0, ldo = e.ldo;
  const __mmask16 first = lanes(left), second = left > kPanel ? lanes(left - kPanel) : 0;
  const int32_t* totals = e.sum + m0;  // the zero point is 1
  const float* row_scale = e.row_scale + m0;
  float* out = e.out + m0 * ldo + n0;
  for (int64_t i = 0; i < std::min<int64_t>(32, rows - m0); ++i, out += ldo) {
    const int32_t* from = sums + i / 16 * 512 + i % 16 * 16;
    const __m512i total = _mm512_set1_epi32(totals[i]);
    const __m512 by = all(row_scale[i]);
    const auto value = [&](const int32_t* at) {
      const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(at), total));
      return _mm512_mul_ps(_mm512_mul_ps(product, by), scale);
    };
    store(out, value(from), first);
    if (second) store(out + kPanel, value(from + 256), second);
  }
}

// The same in AMX tiles; `strips` has room for the left operand, [strips][K / 64] tiles of it.
inline void gemm_quads_amx(const int8_t* left, int64_t rows, int64_t ld, int64_t inner, const Slice* slices,
                           int64_t count, int8_t* strips, int threads) {
  const int64_t quads = quads_of(inner), depth = ceil_div(inner, kDeep), all_strips = ceil_div(rows, 32);
#pragma omp parallel num_threads(threads)
  {
    const TileConfig config;
    constexpr int64_t kPanelBytes = kDeepBlock * kTileBytes;
    uint8_t* panels = scratch().panels.get<uint8_t>(2 * kPanelBytes + kStripBlock * 1024 * 4);
    int32_t* sums = reinterpret_cast<int32_t*>(panels + 2 * kPanelBytes);
#pragma omp for schedule(static)
    for (int64_t s = 0; s < all_strips; ++s)
      pack_strip<false>(left, nullptr, false, rows, ld, inner, s, strips + s * depth * kStripBytes);
    memory_barrier();
    _tile_loadconfig(&config);
    for (int64_t s = 0; s < count; ++s) {
      const Epilogue& e = slices[s].epilogue;
      const int64_t all_panels = ceil_div(e.cols, kPanel);
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < all_panels; p += 2) {
        const int64_t here = std::min<int64_t>(2, all_panels - p);
        for (int64_t first = 0; first < all_strips; first += kStripBlock) {
          const int64_t end = std::min(all_strips, first + kStripBlock);
          for (int64_t d = 0; d < depth; d += kDeepBlock) {
            const int64_t deep = std::min(kDeepBlock, depth - d), of_block = std::min(deep * 4, quads - d * 4);
            for (int64_t i = 0; i < here; ++i)
              unpack_panel(slices[s].quads + ((p + i) * quads + d * 4) * kRowBytes, of_block, panels + i * kPanelBytes);
            memory_barrier();
            for (int64_t strip = first; strip < end; ++strip)
              multiply_strip(strips + (strip * depth + d) * kStripBytes, panels, panels + (here - 1) * kPanelBytes,
                             deep, d > 0, sums + (strip - first) * 1024);
          }
          for (int64_t strip = first; strip < end; ++strip)
            scale_strip(sums + (strip - first) * 1024, strip * 32, rows, p * kPanel, e);
        }
      }
    }
    _tile_release();
  }
}
#endif

}  // namespace
#endif
