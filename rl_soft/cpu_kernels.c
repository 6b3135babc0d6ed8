/* What a step of a rollout spends its time on, on a CPU: products of a few rows with a large matrix, and attention of
 * one position a row. Float32, AVX2; `cpu_kernels.py` compiles it.
 *
 * Libraries pack a matrix before they multiply, which pays where hundreds of rows share the packing. With 1 to 64 rows
 * it costs more than it saves. Here the matrix is read once, as it lies in memory, and 6 of its rows meet 2 of the
 * others' at a time: 12 sums, each in a register. The order of a sum does not depend on how many rows there are. */

typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef float half __attribute__((vector_size(16), aligned(4)));

static inline float total(vec a) {
  union { vec whole; half part[2]; } u = {a};
  half h = u.part[0] + u.part[1];
  return (h[0] + h[2]) + (h[1] + h[3]);
}

/* y[j * N + i] += w[i] . x[j] for R rows of w and C rows of x, over `part` of their K columns; = where `first`. On the
 * way it fetches what comes next in w, a line `apart` bytes after the other: reading keeps pace with multiplying. */
#define TILE(R, C)                                                                                                \
  static void tile_##R##_##C(const float *x, const float *w, float *y, long N, long K, long part, int first,      \
                             const char *next, long apart) {                                                      \
    vec sum[R][C];                                                                                                \
    for (int i = 0; i < R; i++)                                                                                   \
      for (int j = 0; j < C; j++) sum[i][j] = (vec){0};                                                           \
    for (long k = 0; k < part; k += 8, next += apart) {                                                           \
      vec b[C];                                                                                                   \
      __builtin_prefetch(next, 0, 2);                                                                             \
      for (int j = 0; j < C; j++) b[j] = *(const vec *)(x + j * K + k);                                           \
      for (int i = 0; i < R; i++) {                                                                               \
        vec a = *(const vec *)(w + i * K + k);                                                                    \
        for (int j = 0; j < C; j++) sum[i][j] += a * b[j];                                                        \
      }                                                                                                           \
    }                                                                                                             \
    for (int i = 0; i < R; i++)                                                                                   \
      for (int j = 0; j < C; j++) y[j * N + i] = (first ? 0 : y[j * N + i]) + total(sum[i][j]);                   \
  }
TILE(6, 2)
TILE(6, 1)
TILE(1, 2)
TILE(1, 1)

#define COLUMNS 768 /* of w at a time: 6 rows then stay in the first cache */

/* y (M, N) = x (M, K) w (N, K)^T; all contiguous, K a multiple of 8. */
void product(const float *x, const float *w, float *y, long M, long N, long K) {
  long apart = 6 * 8 * sizeof(float) / ((M + 1) / 2) + 1; /* the next rows of w, evenly over this tile's work */
#pragma omp parallel for schedule(static)
  for (long tile = 0; tile < (N + 5) / 6; tile++) {
    long n = tile * 6;
    const char *next = (const char *)(w + (n + 6) * K);
    for (long k = 0; k < K; k += COLUMNS) {
      long part = K - k < COLUMNS ? K - k : COLUMNS, m = 0, step = part / 8 * apart;
      const float *a = w + n * K + k, *b = x + k;
      if (n + 6 <= N) {
        for (; m + 2 <= M; m += 2, next += step) tile_6_2(b + m * K, a, y + m * N + n, N, K, part, !k, next, apart);
        if (m < M) tile_6_1(b + m * K, a, y + m * N + n, N, K, part, !k, next, apart), next += step;
      } else {
        for (long i = 0; n + i < N; i++) {
          for (m = 0; m + 2 <= M; m += 2) tile_1_2(b + m * K, a + i * K, y + m * N + n + i, N, K, part, !k, next, 0);
          if (m < M) tile_1_1(b + m * K, a + i * K, y + m * N + n + i, N, K, part, !k, next, 0);
        }
      }
    }
  }
}

static inline vec exponential(vec x) { /* x <= 0; relative error 1e-7 (Cephes); 0 below -87 */
  typedef int ints __attribute__((vector_size(32)));
  ints kept = x >= -87.0f;
  x = (vec)((ints)x & kept);
  vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 2^23: the integer is in the last bits */
  vec n = shifted - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f, p = r * 1.9875691500e-4f;
  p = (p + 1.3981999507e-3f) * r + 8.3334519073e-3f;
  p = (p * r + 4.1665795894e-2f) * r + 1.6666665459e-1f;
  p = (p * r + 5.0000001201e-1f) * r * r + r + 1.0f;
  return (vec)(((ints)p + ((ints)shifted << 23)) & kept);
}

#define BLOCK 64 /* columns at a time */
#define WIDEST 32 /* vectors of a head */
#define NOTHING (-__builtin_inff())

/* Q queries of one row that share keys and values; softmax over the columns in blocks, as in flash attention. */
#define ATTEND(Q)                                                                                                 \
  static void attend_##Q(const float *q, const float *k, const float *v, const char *seen, float *out,            \
                         long C, long D, float scale) {                                                           \
    float top[Q], sum[Q];                                                                                         \
    vec mean[Q][WIDEST];                                                                                          \
    for (int i = 0; i < Q; i++) {                                                                                 \
      top[i] = NOTHING, sum[i] = 0;                                                                               \
      for (long d = 0; d < D / 8; d++) mean[i][d] = (vec){0};                                                     \
    }                                                                                                             \
    long first = 0;                                                                                               \
    while (seen && first < C && !seen[first]) first++;                                                            \
    for (long start = first; start < C; start += BLOCK) {                                                         \
      long width = C - start < BLOCK ? C - start : BLOCK;                                                         \
      float score[Q][BLOCK];                                                                                      \
      for (long c = 0; c < BLOCK; c++) {                                                                          \
        vec dot[Q];                                                                                               \
        for (int i = 0; i < Q; i++) dot[i] = (vec){0};                                                            \
        int on = c < width && (!seen || seen[start + c]);                                                         \
        for (long d = 0; d < D; d += 16) /* keys that come soon, and this column's values */                      \
          __builtin_prefetch(k + (start + c + 8) * D + d), __builtin_prefetch(v + (start + c) * D + d);           \
        for (long d = 0; on && d < D; d += 8)                                                                     \
          for (int i = 0; i < Q; i++)                                                                             \
            dot[i] += *(const vec *)(k + (start + c) * D + d) * *(const vec *)(q + i * D + d);                    \
        for (int i = 0; i < Q; i++) score[i][c] = on ? total(dot[i]) * scale : NOTHING;                           \
      }                                                                                                           \
      for (int i = 0; i < Q; i++) {                                                                               \
        float higher = top[i];                                                                                    \
        for (int c = 0; c < BLOCK; c++) higher = score[i][c] > higher ? score[i][c] : higher;                     \
        if (higher == NOTHING) higher = 0;                                                                        \
        float rescale = exponential((vec){0} + (top[i] - higher))[0];                                             \
        vec part = {0};                                                                                           \
        for (int c = 0; c < BLOCK; c += 8) {                                                                      \
          vec *s = (vec *)(score[i] + c);                                                                         \
          *s = exponential(*s - higher);                                                                          \
          part += *s;                                                                                             \
        }                                                                                                         \
        top[i] = higher, sum[i] = sum[i] * rescale + total(part);                                                 \
        for (long d = 0; d < D / 8; d++) mean[i][d] *= rescale;                                                   \
      }                                                                                                           \
      for (long d = 0; d < D / 8; d += 2) {                                                                       \
        vec a[Q], b[Q];                                                                                           \
        for (int i = 0; i < Q; i++) a[i] = mean[i][d], b[i] = mean[i][d + 1];                                     \
        for (long c = 0; c < width; c++) {                                                                        \
          const vec *value = (const vec *)(v + (start + c) * D) + d;                                              \
          for (int i = 0; i < Q; i++) a[i] += value[0] * score[i][c], b[i] += value[1] * score[i][c];             \
        }                                                                                                         \
        for (int i = 0; i < Q; i++) mean[i][d] = a[i], mean[i][d + 1] = b[i];                                     \
      }                                                                                                           \
    }                                                                                                             \
    for (int i = 0; i < Q; i++)                                                                                   \
      for (long d = 0; d < D / 8; d++) ((vec *)(out + i * D))[d] = mean[i][d] / sum[i];                           \
  }
ATTEND(1)
ATTEND(2)
ATTEND(3)
ATTEND(4)

/* out (n, A, G, D): attention of one position a row. q (n, A, G, D) and seen (n, C) are contiguous; k, v (n, A, C, D)
 * have contiguous columns, the heads `head` numbers apart and the rows `row`. D is a multiple of 16, 256 at most. */
void attend(const float *q, const float *k, const float *v, const char *seen, float *out, long n, long A, long G,
            long C, long D, long row, long head, float scale) {
  long parts = (G + 3) / 4;
#pragma omp parallel for schedule(static)
  for (long task = 0; task < n * A * parts; task++) {
    long r = task / (A * parts), a = task / parts % A, g = task % parts * 4, at = ((r * A + a) * G + g) * D;
    const float *keys = k + r * row + a * head, *values = v + r * row + a * head;
    const char *mask = seen ? seen + r * C : seen;
    switch (G - g) {
      case 1: attend_1(q + at, keys, values, mask, out + at, C, D, scale); break;
      case 2: attend_2(q + at, keys, values, mask, out + at, C, D, scale); break;
      case 3: attend_3(q + at, keys, values, mask, out + at, C, D, scale); break;
      default: attend_4(q + at, keys, values, mask, out + at, C, D, scale);
    }
  }
}
