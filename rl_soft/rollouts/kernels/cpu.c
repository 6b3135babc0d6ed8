/* What a step of a rollout spends its time on, on a CPU: products of a few rows with a large matrix, attention of one
 * position per row, what lies between them in a decoder layer, and sampling. Float32, AVX2 or AVX-512; `cpu.py`
 * compiles it.
 *
 * Libraries pack a matrix before they multiply, which pays where hundreds of rows share the packing. With 1 to 64 rows
 * it costs more than it saves. Here the matrix is read once, as it lies in memory, and 6 of its rows meet 2 or 4 of the
 * others' at a time: 12 or 24 sums, each in a register. The order of a sum does not depend on how many rows there are. */

#ifdef __AVX512F__
#define LANES 16 /* floats of a vector */
#define ABREAST 4 /* rows of x in a tile of a product: 32 registers hold its sums */
#define ABOVE(a, b) (unsigned short)__builtin_ia32_cmpps512_mask(a, b, 30, -1, 4) /* a bit for each a > b */
#else
#define LANES 8
#define ABREAST 2
#define ABOVE(a, b) __builtin_ia32_movmskps256(a > b)
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float four __attribute__((vector_size(16), aligned(4)));
typedef float two __attribute__((vector_size(8), aligned(4)));
typedef int ints __attribute__((vector_size(4 * LANES)));

static inline float total(vec a) {
  union { vec whole; four part[LANES / 4]; } u = {a};
  four s = u.part[0] + u.part[1];
#if LANES == 16
  s += u.part[2] + u.part[3];
#endif
  return (s[0] + s[2]) + (s[1] + s[3]);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* The way from vectors to their totals, for many at a time: halves of a and b are added, of a where a bit of the position
 * is 0 and of b where it is 1. After a merge for each bit, position p holds the total of vector p. */
#if LANES == 16
#define MERGE_8(a, b)                                                        \
  (SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +   \
   SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define MERGE_4(a, b)                                                        \
  (SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) + \
   SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#define MERGE_2(a, b)                                                        \
  (SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) + \
   SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define MERGE_1(a, b)                                                        \
  (SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) + \
   SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#else
#define MERGE_8(a, b) (a)
#define MERGE_4(a, b) (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
#define MERGE_2(a, b) (SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
#define MERGE_1(a, b) (SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15))
#endif

/* In a register: GCC would read it again for each of its uses, which halves the speed of AVX2. */
#define KEEP(a) __asm__("" : "+v"(a))

/* y[j * N + i] += w[i] . x[j] for 6 rows of w and C rows of x, over `part` of their K columns; = where `first`. On the
 * way it fetches `apart` bytes of what comes next in w, so that reading keeps pace with multiplying; where rows are fewer
 * than a tile's, the processor fetches better by itself. */
#define TILE(C)                                                                                                   \
  static void tile_##C(const float *x, const float *w, float *y, long N, long K, long part, int first,            \
                       const char *next, long apart) {                                                            \
    vec sum[6][C], zero = {0};                                                                                    \
    for (int i = 0; i < 6; i++)                                                                                   \
      for (int j = 0; j < C; j++) sum[i][j] = zero;                                                               \
    for (long k = 0; k < part; k += LANES, next += apart) {                                                       \
      vec b[C];                                                                                                   \
      for (long o = 0; C == ABREAST && o < apart; o += 64) __builtin_prefetch(next + o, 0, 2);                    \
      for (int j = 0; j < C; j++) {                                                                               \
        b[j] = *(const vec *)(x + j * K + k);                                                                     \
        KEEP(b[j]);                                                                                               \
      }                                                                                                           \
      for (int i = 0; i < 6; i++) {                                                                               \
        vec a = *(const vec *)(w + i * K + k);                                                                    \
        KEEP(a);                                                                                                  \
        for (int j = 0; j < C; j++) sum[i][j] += a * b[j];                                                        \
      }                                                                                                           \
    }                                                                                                             \
    for (int j = 0; j < C; j += LANES / 8) { /* totals of 6 sums, in 8 positions for each j */                    \
      vec v[6];                                                                                                   \
      for (int i = 0; i < 6; i++) v[i] = MERGE_8(sum[i][j], (j + 1 < C ? sum[i][j + 1] : zero));                  \
      vec even = MERGE_2(MERGE_4(v[0], v[4]), MERGE_4(v[2], zero));                                               \
      vec odd = MERGE_2(MERGE_4(v[1], v[5]), MERGE_4(v[3], zero));                                                \
      union { vec whole; float at[LANES]; } u = {MERGE_1(even, odd)};                                             \
      for (int p = 0; p < LANES / 8 && j + p < C; p++) {                                                          \
        float *to = y + (j + p) * N;                                                                              \
        four s = *(four *)(u.at + 8 * p);                                                                         \
        two t = *(two *)(u.at + 8 * p + 4);                                                                       \
        *(four *)to = first ? s : *(four *)to + s;                                                                \
        *(two *)(to + 4) = first ? t : *(two *)(to + 4) + t;                                                      \
      }                                                                                                           \
    }                                                                                                             \
  }
TILE(4)
TILE(2)
TILE(1)

/* The same for one row of each; it fetches nothing. */
static float single(const float *x, const float *w, long part) {
  vec sum = {0};
  for (long k = 0; k < part; k += LANES) sum += *(const vec *)(w + k) * *(const vec *)(x + k);
  return total(sum);
}

#define COLUMNS 768 /* of w at a time: 6 rows then stay in the first cache */
#define FEW 256 /* rows of x at a time: they then stay in the second */

static void product_of_few(const float *x, const float *w, float *y, long M, long N, long K) {
  long tiles = (M + ABREAST - 1) / ABREAST, apart = 6 * LANES * sizeof(float) / tiles + 1; /* w's next rows, evenly */
#pragma omp parallel for schedule(static)
  for (long tile = 0; tile < (N + 5) / 6; tile++) {
    long n = tile * 6;
    const char *next = (const char *)(w + (n + 6) * K);
    for (long k = 0; k < K; k += COLUMNS) {
      long part = K - k < COLUMNS ? K - k : COLUMNS, m = 0, step = part / LANES * apart;
      const float *a = w + n * K + k, *b = x + k;
      if (n + 6 <= N) {
        for (; ABREAST == 4 && m + 4 <= M; m += 4, next += step)
          tile_4(b + m * K, a, y + m * N + n, N, K, part, !k, next, apart);
        for (; m + 2 <= M; m += 2, next += step) tile_2(b + m * K, a, y + m * N + n, N, K, part, !k, next, apart);
        if (m < M) tile_1(b + m * K, a, y + m * N + n, N, K, part, !k, next, apart), next += step;
      } else {
        for (long i = 0; n + i < N; i++)
          for (m = 0; m < M; m++) {
            float s = single(b + m * K, a + i * K, part), *to = y + m * N + n + i;
            *to = k ? *to + s : s;
          }
      }
    }
  }
}

/* y (M, N) = x (M, K) w (N, K)^T; all contiguous, K a multiple of LANES. */
void product(const float *x, const float *w, float *y, long M, long N, long K) {
  for (long m = 0; m < M; m += FEW) product_of_few(x + m * K, w, y + m * N, M - m < FEW ? M - m : FEW, N, K);
}

static inline vec exponential(vec x) { /* x <= 0; relative error 1e-7 (Cephes); 0 below -87 */
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
#define WIDEST (256 / LANES) /* vectors of a head */
#define NOTHING (-__builtin_inff())

/* Q queries of one row that share keys and values; softmax over the columns in blocks, as in flash attention. */
#define ATTEND(Q)                                                                                                 \
  static void attend_##Q(const float *q, const float *k, const float *v, const char *seen, float *out,            \
                         long C, long D, float scale) {                                                           \
    float top[Q], sum[Q];                                                                                         \
    vec mean[Q][WIDEST];                                                                                          \
    for (int i = 0; i < Q; i++) {                                                                                 \
      top[i] = NOTHING, sum[i] = 0;                                                                               \
      for (long d = 0; d < D / LANES; d++) mean[i][d] = (vec){0};                                                 \
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
        for (long d = 0; on && d < D; d += LANES)                                                                 \
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
        for (int c = 0; c < BLOCK; c += LANES) {                                                                  \
          vec *s = (vec *)(score[i] + c);                                                                         \
          *s = exponential(*s - higher);                                                                          \
          part += *s;                                                                                             \
        }                                                                                                         \
        top[i] = higher, sum[i] = sum[i] * rescale + total(part);                                                 \
        for (long d = 0; d < D / LANES; d++) mean[i][d] *= rescale;                                               \
      }                                                                                                           \
      for (long d = 0; d < D / LANES; d += 2) {                                                                   \
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
      for (long d = 0; d < D / LANES; d++) ((vec *)(out + i * D))[d] = mean[i][d] / sum[i];                       \
  }
ATTEND(1)
ATTEND(2)
ATTEND(3)
ATTEND(4)

/* out (n, A, G, D): attention of one position per row. q (n, A, G, D) and seen (n, C) are contiguous; k, v (n, A, C,
 * D) have contiguous columns, the heads `head` numbers apart and the rows `row`. D is a multiple of 2 LANES, 256 at most. */
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

#define MANY 32 /* rows whose small parts are worth two threads' start */

/* y (M, H) = w x / sqrt(mean x^2 + eps), by rows (Zhang and Sennrich 2019); y may be x. */
static void rms_norm(const float *x, const float *w, float *y, long M, long H, float eps) {
#pragma omp parallel for schedule(static) if (M > MANY)
  for (long m = 0; m < M; m++) {
    vec squares = {0};
    for (long i = m * H; i < (m + 1) * H; i += LANES) squares += *(const vec *)(x + i) * *(const vec *)(x + i);
    float scale = 1 / __builtin_sqrtf(total(squares) / H + eps);
    for (long i = 0; i < H; i += LANES) *(vec *)(y + m * H + i) = *(const vec *)(x + m * H + i) * scale * *(const vec *)(w + i);
  }
}

/* The heads (A, D) of a row, in place: a bias, a norm of each head, and the rotation of its two halves (RoPE, Su et al.
 * 2021) by cos and sin (D); what is null is left out. */
static void finish_heads(float *x, const float *bias, const float *norm, const float *cos, const float *sin, long A,
                         long D, float eps) {
  for (long i = 0; bias && i < A * D; i += LANES) *(vec *)(x + i) += *(const vec *)(bias + i);
  if (norm) rms_norm(x, norm, x, A, D, eps);
  for (long a = 0; cos && a < A; a++)
    for (long i = a * D, d = 0; d < D / 2; i += LANES, d += LANES) {
      vec *low = (vec *)(x + i), *high = (vec *)(x + i + D / 2), l = *low, h = *high;
      *low = l * *(const vec *)(cos + d) - h * *(const vec *)(sin + d);
      *high = h * *(const vec *)(cos + D / 2 + d) + l * *(const vec *)(sin + D / 2 + d);
    }
}

/* From a layer's input x (M, H) to its queries (M, Q, D), keys and values (M, A, D). Biases (b) and the norms of heads
 * may be null; cos, sin (M, D); h (M, H) is for the normed input. */
void before_attention(const float *x, const float *norm, const float *wq, const float *bq, const float *nq,
                      const float *wk, const float *bk, const float *nk, const float *wv, const float *bv,
                      const float *cos, const float *sin, float *h, float *q, float *k, float *v, long M, long H,
                      long Q, long A, long D, float eps, float eps_heads) {
  rms_norm(x, norm, h, M, H, eps);
  product(h, wq, q, M, Q * D, H);
  product(h, wk, k, M, A * D, H);
  product(h, wv, v, M, A * D, H);
#pragma omp parallel for schedule(static) if (M > MANY)
  for (long m = 0; m < M; m++) {
    finish_heads(q + m * Q * D, bq, nq, cos + m * D, sin + m * D, Q, D, eps_heads);
    finish_heads(k + m * A * D, bk, nk, cos + m * D, sin + m * D, A, D, eps_heads);
    finish_heads(v + m * A * D, bv, 0, 0, 0, A, D, 0);
  }
}

/* From what attention read, a (M, Z), to the layer's output y (M, H): two residuals around a product and a gated MLP
 * (SwiGLU, Shazeer 2020) of width F. h (M, H), gate and up (M, F) are for what comes between. */
void after_attention(const float *x, const float *a, const float *wo, const float *norm, const float *wg,
                     const float *wu, const float *wd, float *h, float *gate, float *up, float *y, long M, long H,
                     long Z, long F, float eps) {
  product(a, wo, h, M, H, Z);
#pragma omp parallel for schedule(static) if (M > MANY)
  for (long i = 0; i < M * H; i += LANES) *(vec *)(y + i) = *(const vec *)(x + i) + *(vec *)(h + i);
  rms_norm(y, norm, h, M, H, eps);
  product(h, wg, gate, M, F, H);
  product(h, wu, up, M, F, H);
#pragma omp parallel for schedule(static)
  for (long i = 0; i < M * F; i += LANES) {
    vec g = *(vec *)(gate + i), one = (vec){0} + 1;
    ints negative = g < 0;
    vec e = exponential((vec)((ints)g | (int)0x80000000)); /* of -|g|: nothing overflows */
    vec top = (vec)(((ints)e & negative) | ((ints)one & ~negative));
    *(vec *)(gate + i) = g * top / (1 + e) * *(vec *)(up + i); /* silu: g / (1 + exp(-g)) */
  }
  product(gate, wd, h, M, H, F);
#pragma omp parallel for schedule(static) if (M > MANY)
  for (long i = 0; i < M * H; i += LANES) *(vec *)(y + i) += *(vec *)(h + i);
}

static inline vec logarithm(vec x) { /* x a normal number above 0; relative error 1e-7 (Cephes) */
  ints bits = (ints)x, e = (bits - 0x3f3504f3) >> 23; /* the mantissa is in [sqrt(1/2), sqrt(2)) */
  vec f = (vec)(bits - (e << 23)) - 1, n = __builtin_convertvector(e, vec), z = f * f;
  vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = (p * f + 1.1676998740e-1f) * f - 1.2420140846e-1f;
  p = (p * f + 1.4249322787e-1f) * f - 1.6668057665e-1f;
  p = (p * f + 2.0000714765e-1f) * f - 2.4999993993e-1f;
  p = (p * f + 3.3333331174e-1f) * f * z;
  return f + (p - n * 2.12194440e-4f - z * 0.5f) + n * 0.693359375f;
}

/* Gumbel noise of LANES indices at one address; `noise.gumbel` to the last bits. */
static inline vec gumbel(const int *index_hash, int low, int high) {
  typedef unsigned int words __attribute__((vector_size(4 * LANES), aligned(4)));
  words b = (*(const words *)index_hash ^ (unsigned)low) * (unsigned)high;
  b += (words)((ints)b >> 16);
  b *= 0x7FEB352Du;
  b += (words)((ints)b >> 15);
  vec u = (vec)((ints)__builtin_convertvector((ints)b, vec) & 0x7fffffff) * (0x1p-31f * (1 - 0x1p-23f)) + 0x1p-32f;
  vec w = 1 - u, d = 1 - w; /* ln(1 - u) = -u ln(w) / (w - 1), exact where w is rounded; and -u where it is 1 */
  ints small = d == 0;
  vec e = -u * logarithm(w) / (vec)(((ints)d & ~small) | ((ints)((vec){0} + 1) & small));
  return -logarithm((vec)(((ints)e & ~small) | ((ints)u & small)));
}

/* M rows of logits x (M, V), divided by the temperature of each: the largest, top (M); the sums of e = exp(x - top) and
 * of e (x - top), mass and dot (M), NaN where a logit is NaN or infinite; and the K largest of x - top + Gumbel noise,
 * falling, values and ids (M, K). low and high (M) are the addresses of the noise. V is a multiple of LANES. */
void draw(const float *x, const float *temperature, const int *low, const int *high, const int *index_hash,
          float *top, float *mass, float *dot, float *values, long *ids, long M, long V, long K) {
#pragma omp parallel for schedule(dynamic)
  for (long m = 0; m < M; m++) {
    const float *row = x + m * V, scale = temperature[m];
    vec most = (vec){0} + NOTHING, zero = {0};
    ints wrong = {0};
    for (long i = 0; i < V; i += LANES) {
      vec a = *(const vec *)(row + i);
      ints above = a > most;
      wrong |= a != a;
      most = (vec)(((ints)a & above) | ((ints)most & ~above));
    }
    float largest = NOTHING;
    int bad = 0;
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest, bad |= wrong[i];
    bad |= largest == NOTHING || largest == -NOTHING;
    top[m] = largest = largest / scale;
    float *v = values + m * K, s = 0, sd = 0;
    long *at = ids + m * K;
    for (long k = 0; k < K; k++) v[k] = NOTHING, at[k] = k;
    for (long block = 0; block < V; block += 2048) {
      vec sum = zero, product = zero;
      for (long i = block; i < V && i < block + 2048; i += LANES) {
        vec a = *(const vec *)(row + i) / scale - largest, e = exponential(a);
        ints kept = a >= -87.0f;
        sum += e, product += e * (vec)((ints)a & kept);
        a += gumbel(index_hash + i, low[m], high[m]);
        int better = ABOVE(a, (vec){0} + v[K - 1]);
        for (int j = 0; better; j++, better >>= 1) {
          if (!(better & 1) || !(a[j] > v[K - 1])) continue;
          long k = K - 1;
          for (; k && a[j] > v[k - 1]; k--) v[k] = v[k - 1], at[k] = at[k - 1];
          v[k] = a[j], at[k] = i + j;
        }
      }
      s += total(sum), sd += total(product);
    }
    mass[m] = bad ? __builtin_nanf("") : s, dot[m] = sd;
  }
}

/* outside (M): the sum of exp(x / temperature - top) over all ids but `ids` (M, K); x is changed and put back. */
void mass_outside(float *x, const float *temperature, const float *top, const long *ids, float *outside, long M,
                  long V, long K) {
#pragma omp parallel for schedule(dynamic)
  for (long m = 0; m < M; m++) {
    float *row = x + m * V, saved[K], s = 0;
    for (long k = 0; k < K; k++) saved[k] = row[ids[m * K + k]], row[ids[m * K + k]] = NOTHING;
    for (long block = 0; block < V; block += 2048) {
      vec sum = {0};
      for (long i = block; i < V && i < block + 2048; i += LANES)
        sum += exponential(*(const vec *)(row + i) / temperature[m] - top[m]);
      s += total(sum);
    }
    for (long k = K - 1; k >= 0; k--) row[ids[m * K + k]] = saved[k];
    outside[m] = s;
  }
}
