// Ternary compute on Pascal (sm_61: P40, GTX 10) and later: int8 quantisers and one GEMM on DP4A, compiled at run time.
//
// Shapes: M rows (tokens), N output features, D input features, K the inner dimension of a GEMM. int8 matrices are
// row-major with rows `ld` bytes apart, ld a multiple of 16 and the bytes beyond the last column zero.
//
// Rounding is half to even. A row or column that holds NaN or Inf gets the scale NaN, which the GEMM carries into every
// product that row or column takes part in. Built with -fmad=false: results equal the eager ones bit for bit.
// No warp intrinsics, so that the same text runs on a host thread by thread in tests.

#define THREADS 256
#define LOW_STEP 254.0f  // the low part counts in 1/254 of the high part's step

typedef signed char int8;

__device__ __forceinline__ int magnitude(float v) {  // orders like |v|, with Inf and NaN on top
  return __float_as_int(v) & 0x7fffffff;
}

__device__ __forceinline__ float scale_value(int largest, float eps) {
  return largest >= 0x7f800000 ? __int_as_float(0x7fc00000) : fmaxf(__int_as_float(largest), eps) / 127.0f;
}

__device__ __forceinline__ float scale_inverse(int largest, float eps) {
  return largest >= 0x7f800000 ? 0.0f : 127.0f / fmaxf(__int_as_float(largest), eps);
}

__device__ __forceinline__ int whole(float v) {  // NaN counts as zero
  return v == v ? (int)rintf(v) : 0;
}

__device__ int block_largest(int mine, int* shared) {
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] = max(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  return shared[0];
}

__device__ double block_sum(double mine, double* shared) {
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

// One block per row: q [M, ldq] int8, scale [M]. With `gain` [D], of RMSNorm(x) * gain; then 1/rms goes to rrms [M].
extern "C" __global__ void quantise_rows(const float* x, long long ldx, int cols, float eps, const float* gain,
                                         double norm_eps, int8* q, int ldq, float* scale, float* rrms) {
  __shared__ int largest[THREADS];
  __shared__ double squares[THREADS];
  const float* row = x + blockIdx.x * ldx;
  int8* out = q + (long long)blockIdx.x * ldq;
  float r = 1.0f;
  if (gain) {
    double sum = 0.0;
    for (int d = threadIdx.x; d < cols; d += THREADS) sum += (double)row[d] * (double)row[d];
    r = (float)(1.0 / sqrt(block_sum(sum, squares) / cols + norm_eps));
  }
  int top = 0;
  for (int d = threadIdx.x; d < cols; d += THREADS)
    top = max(top, magnitude(gain ? row[d] * r * gain[d] : row[d]));
  top = block_largest(top, largest);
  const float inverse = scale_inverse(top, eps);
  for (int d = threadIdx.x; d < ldq; d += THREADS)
    out[d] = d < cols ? (int8)whole((gain ? row[d] * r * gain[d] : row[d]) * inverse) : 0;
  if (threadIdx.x == 0) {
    scale[blockIdx.x] = scale_value(top, eps);
    if (gain) rrms[blockIdx.x] = r;
  }
}

// One block per row of dy * factor [N]: high, low [M, ldq] int8 (low may be null), scale [M].
extern "C" __global__ void gradient_rows(const float* dy, long long ld, int cols, const float* factor, float eps,
                                         int8* high, int8* low, int ldq, float* scale) {
  __shared__ int largest[THREADS];
  const float* row = dy + blockIdx.x * ld;
  const long long first = (long long)blockIdx.x * ldq;
  int top = 0;
  for (int n = threadIdx.x; n < cols; n += THREADS) top = max(top, magnitude(row[n] * factor[n]));
  top = block_largest(top, largest);
  const float inverse = scale_inverse(top, eps);
  for (int n = threadIdx.x; n < ldq; n += THREADS) {
    const float t = n < cols ? row[n] * factor[n] * inverse : 0.0f, h = rintf(t);
    high[first + n] = (int8)whole(h);
    if (low) low[first + n] = (int8)whole((t - h) * LOW_STEP);
  }
  if (threadIdx.x == 0) scale[blockIdx.x] = scale_value(top, eps);
}

// Raises largest [N], zero at first, to the magnitudes of dy * factor [M] by column. Grid: (N / 32, M / 256).
extern "C" __global__ void column_largest(const float* dy, long long ld, int rows, int cols, const float* factor,
                                          int* largest) {
  __shared__ int tops[THREADS];
  const int lane = threadIdx.x % 32, n = blockIdx.x * 32 + lane, end = min(rows, (int)(blockIdx.y + 1) * 256);
  int top = 0;
  if (n < cols)
    for (int m = blockIdx.y * 256 + threadIdx.x / 32; m < end; m += THREADS / 32)
      top = max(top, magnitude(dy[m * ld + n] * factor[m]));
  tops[threadIdx.x] = top;
  __syncthreads();
  if (threadIdx.x < 32 && n < cols) {
    for (int i = 1; i < THREADS / 32; ++i) top = max(top, tops[i * 32 + lane]);
    atomicMax(largest + n, top);
  }
}

// Columns of dy * factor [M], transposed: high, low [N, ldm] int8 (low may be null), scale [N]. Grid: (N / 32, ldm / 64).
extern "C" __global__ void gradient_columns(const float* dy, long long ld, int rows, int cols, const float* factor,
                                            const int* largest, float eps, int8* high, int8* low, int ldm,
                                            float* scale) {
  __shared__ int words[2][32][17];
  const int lane = threadIdx.x % 32, n = blockIdx.x * 32 + lane, m0 = blockIdx.y * 64;
  const int top = n < cols ? largest[n] : 0;
  const float inverse = scale_inverse(top, eps);
  for (int group = threadIdx.x / 32; group < 16; group += THREADS / 32) {
    unsigned int h4 = 0, l4 = 0;
    for (int i = 0; i < 4; ++i) {
      const int m = m0 + group * 4 + i;
      const float t = n < cols && m < rows ? dy[m * ld + n] * factor[m] * inverse : 0.0f, h = rintf(t);
      h4 |= (unsigned int)(whole(h) & 255) << (8 * i);
      l4 |= (unsigned int)(whole((t - h) * LOW_STEP) & 255) << (8 * i);
    }
    words[0][lane][group] = (int)h4;
    words[1][lane][group] = (int)l4;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 512; i += THREADS) {
    const int column = i / 16, word = i % 16, at = blockIdx.x * 32 + column;
    if (at < cols && m0 + word * 4 < ldm) {
      const long long to = ((long long)at * ldm + m0) / 4 + word;
      ((int*)high)[to] = words[0][column][word];
      if (low) ((int*)low)[to] = words[1][column][word];
    }
  }
  if (blockIdx.y == 0 && threadIdx.x < 32 && n < cols) scale[n] = scale_value(top, eps);
}

// q [M, ldq] int8 -> [D, ldm] int8, zero beyond M. Grid: (D / 32, ldm / 64).
extern "C" __global__ void transpose_bytes(const int8* q, int ldq, int rows, int cols, int8* out, int ldm) {
  __shared__ int words[32][17];
  const int lane = threadIdx.x % 32, n = blockIdx.x * 32 + lane, m0 = blockIdx.y * 64;
  for (int group = threadIdx.x / 32; group < 16; group += THREADS / 32) {
    unsigned int four = 0;
    for (int i = 0; i < 4; ++i) {
      const int m = m0 + group * 4 + i;
      if (n < cols && m < rows) four |= (unsigned int)(q[(long long)m * ldq + n] & 255) << (8 * i);
    }
    words[lane][group] = (int)four;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 512; i += THREADS) {
    const int column = i / 16, word = i % 16, at = blockIdx.x * 32 + column;
    if (at < cols && m0 + word * 4 < ldm) ((int*)out)[((long long)at * ldm + m0) / 4 + word] = words[column][word];
  }
}

// The GEMM. A block makes 128 x 128 products, a thread 8 x 8 of them; each step takes 32 bytes of the inner dimension
// through shared memory, held transposed so that a thread reads 4 neighbours at once, and twice, so that the next step
// loads while this one multiplies. 17 KB of shared memory and at most 128 registers leave room for two blocks per
// multiprocessor. With LOW, the 128 left rows are 64 high parts and the 64 low parts of the same rows.
#define TILE 128
#define STEP 8                // ints of the inner dimension per step
#define SHARED_LD (TILE + 4)  // the padding spreads the transposing stores over all banks

__device__ __forceinline__ int4 load_four(const int8* matrix, int row, int rows, int ld, int byte) {
  if (row < rows && byte < ld) return *(const int4*)(matrix + (long long)row * ld + byte);
  return make_int4(0, 0, 0, 0);
}

__device__ __forceinline__ void store_four(int* shared, int row, int first, int4 v) {
  shared[(first + 0) * SHARED_LD + row] = v.x;
  shared[(first + 1) * SHARED_LD + row] = v.y;
  shared[(first + 2) * SHARED_LD + row] = v.z;
  shared[(first + 3) * SHARED_LD + row] = v.w;
}

template <bool LOW>
__device__ __forceinline__ void gemm(const int8* high, const int8* low, const int8* right, int rows, int cols, int ld,
                                     const float* row_scale, const float* scale, float* out) {
  __shared__ __align__(16) int left_tile[2][STEP * SHARED_LD];
  __shared__ __align__(16) int right_tile[2][STEP * SHARED_LD];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int load_row = threadIdx.x / 2, load_int = threadIdx.x % 2 * 4;  // 2 threads fetch the 32 bytes of a row
  const int m0 = blockIdx.y * (LOW ? TILE / 2 : TILE), n0 = blockIdx.x * TILE;
  const int8* left = LOW && load_row >= TILE / 2 ? low : high;
  const int left_row = m0 + (LOW ? load_row % (TILE / 2) : load_row), right_row = n0 + load_row;
  const int steps = (ld + 4 * STEP - 1) / (4 * STEP);

  int acc[8][8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) acc[i][j] = 0;

  int4 next_left = load_four(left, left_row, rows, ld, load_int * 4);
  int4 next_right = load_four(right, right_row, cols, ld, load_int * 4);
  store_four(left_tile[0], load_row, load_int, next_left);
  store_four(right_tile[0], load_row, load_int, next_right);
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const int byte = ((step + 1) * STEP + load_int) * 4;
    if (step + 1 < steps) {
      next_left = load_four(left, left_row, rows, ld, byte);
      next_right = load_four(right, right_row, cols, ld, byte);
    }
    const int *a = left_tile[step % 2], *b = right_tile[step % 2];
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      const int4 a0 = *(const int4*)(a + k * SHARED_LD + ty * 4), a1 = *(const int4*)(a + k * SHARED_LD + 64 + ty * 4);
      const int4 b0 = *(const int4*)(b + k * SHARED_LD + tx * 4), b1 = *(const int4*)(b + k * SHARED_LD + 64 + tx * 4);
      const int left_ints[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
      const int right_ints[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] = __dp4a(left_ints[i], right_ints[j], acc[i][j]);
    }
    if (step + 1 < steps) {
      store_four(left_tile[(step + 1) % 2], load_row, load_int, next_left);
      store_four(right_tile[(step + 1) % 2], load_row, load_int, next_right);
    }
    __syncthreads();
  }

  const float s = *scale;
#pragma unroll
  for (int i = 0; i < (LOW ? 4 : 8); ++i) {
    const int m = m0 + ty * 4 + i % 4 + i / 4 * 64;
    if (m >= rows) continue;
    const float r = row_scale[m];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int n = n0 + tx * 4 + j % 4 + j / 4 * 64;
      float v = (float)acc[i][j];
      if (LOW) v = v + (float)acc[i % 4 + 4][j] * (1.0f / LOW_STEP);
      if (n < cols) out[(long long)m * cols + n] = v * r * s;
    }
  }
}

// out [M, N] = left [M, K] right [N, K]^T * row_scale[m] * scale; both operands with rows `ld` apart.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    gemm_one(const int8* high, const int8* low, const int8* right, int rows, int cols, int ld, const float* row_scale,
             const float* scale, float* out) {
  gemm<false>(high, low, right, rows, cols, ld, row_scale, scale, out);
}

// The same of high + low / 254.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    gemm_two(const int8* high, const int8* low, const int8* right, int rows, int cols, int ld, const float* row_scale,
             const float* scale, float* out) {
  gemm<true>(high, low, right, rows, cols, ld, row_scale, scale, out);
}
