// The int8 GEMM of ternary_cpu.cpp in AMX tiles: the same operands and the same results as ternary_gemm.h.
//
// One instruction multiplies a tile of 16 left rows x 64 signed bytes by one of 64 x 16 unsigned bytes. The panels of the
// right operand hold their tiles as the instruction wants them; the left operand is copied into tiles first, [strips]
// [K/64][2][16][64], so that it may come in either form and needs no special case at its edges: zeros fill it up, and
// what stands beside them in the right operand doesn't count. The two tiles of a strip are 32 rows, or 16 rows of the
// high parts and the same 16 of the low ones.

#pragma once

#include "ternary_gemm.h"

#if TBF_GEMM && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>
#define TBF_AMX 1

namespace {

constexpr int64_t kDeep = 64, kTileBytes = 16 * kDeep, kStripBytes = 2 * kTileBytes;
constexpr int64_t kBlockRows = 256, kBlockPairs = 8, kBlockDepth = 32;  // 1.3 MB of operands and sums: second-level cache

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool may_use_amx() {  // Linux keeps room for the tiles of a thread only on request: ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

void memory_barrier() { __asm__ volatile("" ::: "memory"); }  // tile instructions don't tell the compiler what they touch

template <bool LOW>
void pack_strip(const int8_t* high, const int8_t* low, bool tiled, int64_t rows, int64_t ldl, int64_t inner,
                int64_t strip, int8_t* out) {
  constexpr int64_t kTileRows = LOW ? 4 : 8;
  const int64_t groups = ceil_div(inner, 4), depth = ceil_div(inner, kDeep);
  const __m512i every_eighth = _mm512_mullo_epi32(
      _mm512_set1_epi32(8), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t bytes = std::min(kDeep, inner - d * kDeep), words = std::min<int64_t>(16, groups - d * 16);
    for (int64_t i = 0; i < 32; ++i, out += kDeep) {
      const bool second = LOW && i >= 16;
      const int64_t m = strip * (LOW ? 16 : 32) + (second ? i - 16 : i);
      __m512i row = _mm512_setzero_si512();
      if (m >= rows) {
      } else if (tiled) {
        const int8_t* from = high + (m / kTileRows * groups + d * 16) * 32 + (m % kTileRows + (second ? 4 : 0)) * 4;
        row = _mm512_mask_i32gather_epi32(row, static_cast<__mmask16>((1u << words) - 1), every_eighth, from, 4);
      } else {
        row = _mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), (second ? low : high) + m * ldl + d * kDeep);
      }
      _mm512_storeu_si512(out, row);
    }
  }
}

// sums [2][2][16][16] of a strip and two panels over `depth` tiles; `more`: added to what `sums` holds.
inline void multiply_strip(const int8_t* left, const uint8_t* first, const uint8_t* second, int64_t depth, bool more,
                           int32_t* sums) {
  if (more) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; ++d, left += kStripBytes, first += kTileBytes, second += kTileBytes) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, first, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, second, 64);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, left + kTileBytes, 64);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  memory_barrier();
}

template <bool LOW>
inline void finish_strip(const int32_t* sums, int64_t m0, int64_t rows, int64_t n0, const Epilogue& e) {
  for (int64_t i = 0; i < std::min<int64_t>(LOW ? 16 : 32, rows - m0); ++i) {
    for (int64_t j = 0; j < 2 && n0 + j * kPanel < e.cols; ++j) {
      const int32_t* from = sums + (i / 16 * 2 + j) * 256 + i % 16 * 16;
      finish<LOW>(_mm512_loadu_si512(from), LOW ? _mm512_loadu_si512(from + 512) : _mm512_setzero_si512(), m0 + i,
                  n0 + j * kPanel, e);
    }
  }
}

template <bool LOW>
void gemm_amx(const int8_t* high, const int8_t* low, bool tiled, int64_t rows, int64_t ldl, const uint8_t* right,
              int64_t inner, const Epilogue& e, int threads) {
  constexpr int64_t kRows = LOW ? 16 : 32;
  const int64_t depth = ceil_div(inner, kDeep), panel = ceil_div(inner, 4) * 4 * kPanel;
  const int64_t strips = ceil_div(rows, kRows), panels = ceil_div(e.cols, kPanel), pairs = ceil_div(panels, 2);
  const int64_t fair = ceil_div(strips * ceil_div(pairs, kBlockPairs), 8 * threads);  // about 8 blocks per thread
  const int64_t block = std::clamp<int64_t>(fair, 1, kBlockRows / kRows);
  const std::unique_ptr<int8_t[]> packed(new int8_t[strips * depth * kStripBytes]);
#pragma omp parallel num_threads(threads)
  {
    const TileConfig config;
    const std::unique_ptr<int32_t[]> sums(new int32_t[block * kBlockPairs * 1024]);
#pragma omp for schedule(static)
    for (int64_t s = 0; s < strips; ++s)
      pack_strip<LOW>(high, low, tiled, rows, ldl, inner, s, packed.get() + s * depth * kStripBytes);
    memory_barrier();
    _tile_loadconfig(&config);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t p0 = 0; p0 < pairs; p0 += kBlockPairs) {
      for (int64_t s0 = 0; s0 < strips; s0 += block) {
        for (int64_t d0 = 0; d0 < depth; d0 += kBlockDepth) {
          const int64_t here = std::min(kBlockDepth, depth - d0);
          int32_t* to = sums.get();
          for (int64_t p = p0; p < std::min(pairs, p0 + kBlockPairs); ++p) {
            const uint8_t* first = right + p * 2 * panel + d0 * kTileBytes;
            const uint8_t* second = p * 2 + 1 < panels ? first + panel : first;  // a missing panel isn't stored
            for (int64_t s = s0; s < std::min(strips, s0 + block); ++s, to += 1024) {
              multiply_strip(packed.get() + (s * depth + d0) * kStripBytes, first, second, here, d0 > 0, to);
              if (d0 + here == depth) finish_strip<LOW>(to, s * kRows, rows, p * 2 * kPanel, e);
            }
          }
        }
        _mm_sfence();
      }
    }
    _tile_release();
  }
}

}  // namespace
#else
#define TBF_AMX 0
#endif
