// One token of a decoder, as few kernels as it takes: every weight is read once, and nothing else goes through memory
// but the hidden state. Compiled at load time for one model and one GPU; no header is needed.
//
//     D dim    H heads    K key/value heads    E head_dim    F hidden_dim    V vocab_size    B batch (1 to 8)
//
// Given as macros: BATCH, DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, EPS, SCALE, SPLITS (parts of a long attention),
// RING (pieces of a matrix that each warp has under way), QKV_TILES, ... (eights of rows that a block takes at once),
// BITS and HEAD_BITS (of a projection's and of the embedding's weights: 16, 8 or 4), BLOCK and HEAD_BLOCK (weights that
// share a scale), BFLOAT16 where the 16-bit type is that one.
//
// Each kernel may start while the one before it still runs: it reads weights, which never change, and waits before it
// reads anything else. Follows kernel_basics.cu.

#define WARPS 8
#define THREADS (32 * WARPS)
#define GROUP (HEADS / KV_HEADS)
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)

struct alignas(16) Word4 { u32 x, y, z, w; };
struct alignas(16) Float4 { float x, y, z, w; };

// ---- 16-bit numbers ----

#ifdef BFLOAT16
#define MMA_TYPE "bf16"
__device__ __forceinline__ float widen(u16 h) { return __uint_as_float((u32)h << 16); }
__device__ __forceinline__ u32 narrow2(float low, float high) {
  u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
#else
#define MMA_TYPE "f16"
__device__ __forceinline__ float widen(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
__device__ __forceinline__ u32 narrow2(float low, float high) {
  u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
#endif
__device__ __forceinline__ u16 narrow(float f) { return (u16)narrow2(f, 0.0f); }
__device__ __forceinline__ float low(u32 pair) { return widen((u16)(pair & 0xffff)); }
__device__ __forceinline__ float high(u32 pair) { return widen((u16)(pair >> 16)); }

__device__ __forceinline__ u32 multiply2(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
__device__ __forceinline__ u32 subtract2(u32 a, u32 b) { u32 r; asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
template <int TABLE> __device__ __forceinline__ u32 lop3(u32 a, u32 b, u32 c) {
  u32 r; asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(TABLE)); return r;
}

// ---- memory ----

__device__ __forceinline__ Word4 load_weights(const void* p) {  // read once, by nobody else
  Word4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ Word4 load_fresh(const void* p) {  // what the kernel before wrote, from L2
  Word4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ Float4 load_fresh4(const float* p) {
  Float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float load_fresh1(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

// ---- products ----
//
// mma.m16n8k16: A is the hidden state (rows of the batch), B is 8 rows of a matrix (N, K) stored row by row. Which k
// stands where in a fragment is free as long as both agree: a lane reads 16 neighbouring bytes of its row.

__device__ __forceinline__ void mma(float (&sum)[2], u32 a_low, u32 a_high, u32 b_low, u32 b_high) {
  float unused2 = 0.0f, unused3 = 0.0f;  // rows 8 to 15 of the batch, which has none
  asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(unused2), "+f"(unused3)
      : "r"(a_low), "r"(0), "r"(a_high), "r"(0), "r"(b_low), "r"(b_high));
}

// Where element e of eight stands: 4-bit weights come out of a word as pairs (0, 4), (1, 5), (2, 6), (3, 7).
template <int bits> __device__ __forceinline__ int place(int e) {
  return bits != 4 ? e : (e & ~7) | ((e & 3) << 1) | ((e >> 2) & 1);
}

template <int bits> __device__ __forceinline__ void widened(Word4 w, u32 scale, int part, u32 (&b)[4]);
// Eight 16-bit weights are as they are.
template <> __device__ __forceinline__ void widened<16>(Word4 w, u32, int, u32 (&b)[4]) {
  b[0] = w.x; b[1] = w.y; b[2] = w.z; b[3] = w.w;
}
// Eight of sixteen bytes: 1024 + q is 0x6400 | q, less 1024 + 128.
template <> __device__ __forceinline__ void widened<8>(Word4 w, u32 scale, int part, u32 (&b)[4]) {
  const u32 first = part ? w.z : w.x, second = part ? w.w : w.y;
  b[0] = __byte_perm(first, 0x64646464, 0x4140); b[1] = __byte_perm(first, 0x64646464, 0x4342);
  b[2] = __byte_perm(second, 0x64646464, 0x4140); b[3] = __byte_perm(second, 0x64646464, 0x4342);
#pragma unroll
  for (int i = 0; i < 4; i++) b[i] = multiply2(subtract2(b[i], 0x64806480), scale);
}
// Eight of 32 half bytes: 1024 + q less 1032 for the lower ones, (1024 + 16 q) / 16 less 72 for the upper ones.
template <> __device__ __forceinline__ void widened<4>(Word4 w, u32 scale, int part, u32 (&b)[4]) {
  const u32 word = part == 0 ? w.x : part == 1 ? w.y : part == 2 ? w.z : w.w;
  constexpr int AND_OR = (0xf0 & 0xcc) | 0xaa;
  const u32 shifted = word >> 8;
  b[0] = subtract2(lop3<AND_OR>(word, 0x000f000f, 0x64006400), 0x64086408);
  b[1] = fma2(lop3<AND_OR>(word, 0x00f000f0, 0x64006400), 0x2c002c00, 0xd480d480);
  b[2] = subtract2(lop3<AND_OR>(shifted, 0x000f000f, 0x64006400), 0x64086408);
  b[3] = fma2(lop3<AND_OR>(shifted, 0x00f000f0, 0x64006400), 0x2c002c00, 0xd480d480);
#pragma unroll
  for (int i = 0; i < 4; i++) b[i] = multiply2(b[i], scale);
}

// The batch row of this lane in a fragment; those beyond the batch repeat the first, and nobody reads their sums.
__device__ __forceinline__ int lane_batch() { const int row = (threadIdx.x & 31) >> 2; return row < BATCH ? row : 0; }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void end_of_copy() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void copied() { asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory"); }

// A block's way through the rows of `parts` matrices (n, k), one above the other: 8 rows a tile, `tiles` of them at once
// of each matrix, its warps taking every WARPS-th piece of the columns. Weights go from memory to a ring in shared
// memory, RING pieces ahead.
template <int bits, int block, int k, int n, int parts, int tiles>
struct Rows {
  static constexpr int sets = parts * tiles;
  static constexpr int OWN = 128 / bits;             // weights of one lane in a piece
  static constexpr int PIECE = 4 * OWN;              // columns of a piece
  static constexpr int PIECES = k / PIECE;
  static constexpr int LOADS = (PIECES + WARPS - 1) / WARPS;  // pieces of a warp in a tile
  static constexpr int SCALES = bits == 16 ? 0 : PIECE / block;  // of one row in a piece
  static constexpr int SLOT = sets * (512 + 8 * SCALES * 2);  // bytes of a piece: 8 rows
  static constexpr int DEPTH = RING / sets;
  static constexpr int RING_BYTES = WARPS * DEPTH * SLOT;
  static constexpr int SUM_FLOATS = WARPS * sets * BATCH * 8;
  static_assert(k % PIECE == 0 && n % (8 * tiles) == 0 && RING % sets == 0, "shape");
  static_assert(bits == 16 || SCALES % 2 == 0, "block");

  const u8* matrix;
  const u16* scales;
  u8* ring;      // this warp's
  int issued, items;

  __device__ __forceinline__ Rows(const u8* matrix, const u16* scales, u8* rings) : matrix(matrix), scales(scales), issued(0) {
    ring = rings + threadIdx.x / 32 * DEPTH * SLOT;
    items = ((n / 8 / tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x) * LOADS;
  }
  static __device__ __forceinline__ int piece(int load) { return load * WARPS + threadIdx.x / 32; }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) issue();
  }
  __device__ __forceinline__ void issue() {
    const int own = piece(issued % LOADS), tile = blockIdx.x + issued / LOADS * gridDim.x, lane = threadIdx.x & 31;
    if (issued < items && (PIECES % WARPS == 0 || own < PIECES)) {
      u8* slot = ring + issued % DEPTH * SLOT;
#pragma unroll
      for (int s = 0; s < sets; s++) {
        const i64 row = s / tiles * n + (tile * tiles + s % tiles) * 8 + lane / 4;
        copy16(slot + s * 512 + lane * 16, matrix + (row * k + own * PIECE + (lane & 3) * OWN) * bits / 8);
        if (SCALES && (lane & 3) < SCALES / 2)
          copy4(slot + sets * 512 + (s * 8 + lane / 4) * SCALES * 2 + (lane & 3) * 4, scales + row * (k / block) + own * SCALES + (lane & 3) * 2);
      }
    }
    end_of_copy();
    issued++;
  }
  // Adds the piece of `item` times x, (B, k + 32) in shared memory, and has the ring's next one fetched.
  __device__ __forceinline__ void multiply(int item, const u16* x, float (&sums)[sets][2]) {
    const int own = piece(item % LOADS), lane = threadIdx.x & 31;
    copied<DEPTH - 1>();
    if (SCALES) __syncwarp();
    if (PIECES % WARPS == 0 || own < PIECES) {
      const u8* slot = ring + item % DEPTH * SLOT;
      Word4 words[sets];
      u32 scale[sets];
#pragma unroll
      for (int s = 0; s < sets; s++) {
        words[s] = *(const Word4*)(slot + s * 512 + lane * 16);
        scale[s] = SCALES ? ((const u16*)(slot + sets * 512))[(s * 8 + lane / 4) * SCALES + (lane & 3) * OWN / block] * 0x10001u : 0;
      }
      const u16* row = x + lane_batch() * (k + 32) + own * PIECE + (lane & 3) * OWN;
#pragma unroll
      for (int part = 0; part < OWN / 8; part++) {
        const Word4 a = *(const Word4*)(row + 8 * part);
#pragma unroll
        for (int s = 0; s < sets; s++) {
          u32 b[4];
          widened<bits>(words[s], scale[s], part, b);
          mma(sums[s], a.x, a.y, b[0], b[1]);
          mma(sums[s], a.z, a.w, b[2], b[3]);
        }
      }
    }
    if (SCALES) __syncwarp();
    issue();
  }
  // `finish(batch row, row of each matrix, its sums)` for every row, each by one thread
  template <class Finish> __device__ __forceinline__ void product(const u16* x, float* shared, const Finish& finish) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    for (int turn = 0; turn < items / LOADS; turn++) {
      float sums[sets][2] = {};
#pragma unroll
      for (int load = 0; load < LOADS; load++) multiply(turn * LOADS + load, x, sums);
      float* of_warps = shared + (turn & 1) * SUM_FLOATS;
      if (lane / 4 < BATCH) {
#pragma unroll
        for (int s = 0; s < sets; s++) {
          float* at = of_warps + ((warp * sets + s) * BATCH + lane / 4) * 8 + (lane & 3) * 2;
          at[0] = sums[s][0]; at[1] = sums[s][1];
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < tiles * BATCH * 8; i += THREADS) {
        float total[parts] = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++)
#pragma unroll
          for (int p = 0; p < parts; p++) total[p] += of_warps[(w * sets + p * tiles) * BATCH * 8 + i];
        finish(i / 8 % BATCH, ((blockIdx.x + turn * gridDim.x) * tiles + i / (BATCH * 8)) * 8 + i % 8, total);
      }
    }
  }
};

// ---- norm ----

// (B, D) float32 hidden states, normalised and weighted, into shared memory as 16-bit numbers in the order `bits` wants.
template <int bits> struct Norm {
  static constexpr int OWN = (DIM / 4 + THREADS - 1) / THREADS;  // fours of a thread
  u32 weights[OWN][2];

  static __device__ __forceinline__ int at(int i) { return (i * THREADS + threadIdx.x) * 4; }
  __device__ __forceinline__ Norm(const u16* weight) {  // while the kernel before still runs
#pragma unroll
    for (int i = 0; i < OWN; i++)
      if (at(i) < DIM) asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(weights[i][0]), "=r"(weights[i][1]) : "l"(weight + at(i)) : "memory");
  }
  __device__ __forceinline__ void apply(const float* hidden, u16* normed, float* shared) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    Float4 values[BATCH][OWN];
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
      for (int i = 0; i < OWN; i++) values[b][i] = at(i) < DIM ? load_fresh4(hidden + b * DIM + at(i)) : Float4{};
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        const Float4 v = values[b][i];
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      }
#pragma unroll
      for (int o = 16; o; o >>= 1) squares += __shfl_xor_sync(~0u, squares, o);
      if (lane == 0) shared[b * WARPS + warp] = squares;
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      float squares = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) squares += shared[b * WARPS + w];
      const float factor = rsqrtf(squares / DIM + EPS);
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        if (at(i) >= DIM) continue;
        const Float4 v = values[b][i];
        u16* row = normed + b * (DIM + 32);
        row[place<bits>(at(i))] = narrow(v.x * factor * low(weights[i][0]));
        row[place<bits>(at(i) + 1)] = narrow(v.y * factor * high(weights[i][0]));
        row[place<bits>(at(i) + 2)] = narrow(v.z * factor * low(weights[i][1]));
        row[place<bits>(at(i) + 3)] = narrow(v.w * factor * high(weights[i][1]));
      }
    }
    __syncthreads();
  }
};

// ---- kernels ----

// embedding: token ids (B,) int64 to hidden (B, D) float32
extern "C" __global__ void embed(const i64* tokens, const u8* table, const u16* scales, float* hidden) {
  let_next_start();
  const i64 token = tokens[blockIdx.x];
  for (int i = threadIdx.x; i < DIM; i += blockDim.x) {
    const i64 at = token * DIM + i;
    float value;
    if (HEAD_BITS == 16) {
      value = widen(((const u16*)table)[at]);
    } else {
      const int level = HEAD_BITS == 8 ? table[at] : (table[at / 2] >> (4 * (at & 1))) & 15;
      value = widen(narrow((level - (1 << (HEAD_BITS - 1))) * widen(scales[at / HEAD_BLOCK])));
    }
    hidden[blockIdx.x * DIM + i] = value;
  }
}

// Shared memory of a product: the ring, the sums of warps twice, the input.
template <class R, int k> struct Shared {
  static __device__ __forceinline__ u8* ring() { extern __shared__ Word4 memory[]; return (u8*)memory; }
  static __device__ __forceinline__ float* sums() { return (float*)(ring() + R::RING_BYTES); }
  static __device__ __forceinline__ u16* input() { return (u16*)(sums() + 2 * R::SUM_FLOATS); }
};

// out (B, n) float32 = norm(hidden) times a matrix (n, D)
template <int bits, int block, int n, int tiles> __device__ __forceinline__ void normed_product(
    const float* hidden, const u16* norm, const u8* matrix, const u16* scales, float* out) {
  typedef Rows<bits, block, DIM, n, 1, tiles> R;
  typedef Shared<R, DIM> S;
  R rows(matrix, scales, S::ring());
  let_next_start();
  rows.start();
  const Norm<bits> normed(norm);
  wait_for_last();
  normed.apply(hidden, S::input(), S::sums());
  rows.product(S::input(), S::sums(), [&](int b, int row, float (&sum)[1]) { out[(i64)b * n + row] = sum[0]; });
}

extern "C" __global__ void __launch_bounds__(THREADS) project_qkv(const float* hidden, const u16* norm, const u8* matrix, const u16* scales, float* out) {
  normed_product<BITS, BLOCK, QKV, QKV_TILES>(hidden, norm, matrix, scales, out);
}
extern "C" __global__ void __launch_bounds__(THREADS) project_logits(const float* hidden, const u16* norm, const u8* matrix, const u16* scales, float* out) {
  normed_product<HEAD_BITS, HEAD_BLOCK, VOCAB, LOGIT_TILES>(hidden, norm, matrix, scales, out);
}

// out (B, F) = silu(x times gate) * (x times up), x = norm(hidden), the matrix (2 F, D) being gate above up
extern "C" __global__ void __launch_bounds__(THREADS) project_gate_up(const float* hidden, const u16* norm, const u8* matrix, const u16* scales, u16* out) {
  typedef Rows<BITS, BLOCK, DIM, HIDDEN, 2, GATE_TILES> R;
  typedef Shared<R, DIM> S;
  R rows(matrix, scales, S::ring());
  let_next_start();
  rows.start();
  const Norm<BITS> normed(norm);
  wait_for_last();
  normed.apply(hidden, S::input(), S::sums());
  rows.product(S::input(), S::sums(), [&](int b, int row, float (&sum)[2]) {
    out[(i64)b * HIDDEN + place<BITS>(row)] = narrow(sum[0] / (1.0f + __expf(-sum[0])) * sum[1]);
  });
}

// hidden (B, D) += x (B, k) times a matrix (D, k)
template <int k, int tiles> __device__ __forceinline__ void added_product(const u16* x, const u8* matrix, const u16* scales, float* hidden) {
  typedef Rows<BITS, BLOCK, k, DIM, 1, tiles> R;
  typedef Shared<R, k> S;
  R rows(matrix, scales, S::ring());
  let_next_start();
  rows.start();
  wait_for_last();
#pragma unroll
  for (int b = 0; b < BATCH; b++)
    for (int i = threadIdx.x * 8; i < k; i += THREADS * 8) *(Word4*)(S::input() + b * (k + 32) + i) = load_fresh(x + (i64)b * k + i);
  __syncthreads();
  rows.product(S::input(), S::sums(), [&](int b, int row, float (&sum)[1]) {
    float* at = hidden + (i64)b * DIM + row;
    *at = load_fresh1(at) + sum[0];
  });
}

extern "C" __global__ void __launch_bounds__(THREADS) project_out(const u16* x, const u8* matrix, const u16* scales, float* hidden) {
  added_product<HEADS * HEAD_DIM, OUT_TILES>(x, matrix, scales, hidden);
}
extern "C" __global__ void __launch_bounds__(THREADS) project_down(const u16* x, const u8* matrix, const u16* scales, float* hidden) {
  added_product<HIDDEN, DOWN_TILES>(x, matrix, scales, hidden);
}

// ---- attention ----
//
// A block has one key/value head, its GROUP query heads, and one part of a row's positions. A team of HEAD_DIM / 8 lanes
// takes one position at a time, and reads several ahead. The block that is done last puts the parts together.

#define ATTENTION_THREADS (GROUP <= 4 ? 256 : 128)
#define ATTENTION_BLOCKS (BATCH == 1 ? 1 : 2)  // of a multiprocessor: several rows have work for more
#define LANES (HEAD_DIM / 8)
#define TEAMS (ATTENTION_THREADS / LANES)
#define AHEAD 4
#define TURNS 2  // a part has so many times what is read ahead, as long as there are parts enough
#define RECORD (HEAD_DIM + 4)  // weighted values, their weight, the largest score; 16 bytes at a time
#define LOG2_E 1.4426950408889634f
#define LOWEST -1e30f

// Channel e of a head, turned by its position.
__device__ __forceinline__ float turned(const float* row, int e, const u16* cos, const u16* sin) {
  constexpr int half = HEAD_DIM / 2;
  const int i = e % half;
  const float other = load_fresh1(row + (e < half ? e + half : e - half));
  return load_fresh1(row + e) * widen(__ldg(cos + i)) + (e < half ? -other : other) * widen(__ldg(sin + i));
}

__device__ __forceinline__ void unpack(Word4 w, float (&f)[8]) {
  f[0] = low(w.x); f[1] = high(w.x); f[2] = low(w.y); f[3] = high(w.y); f[4] = low(w.z); f[5] = high(w.z); f[6] = low(w.w); f[7] = high(w.w);
}

// One team's running softmax over its positions, for every query head of the group.
struct Running {
  float largest[GROUP], weight[GROUP], sums[GROUP][8];

  __device__ __forceinline__ Running() {
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      largest[g] = LOWEST; weight[g] = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; i++) sums[g][i] = 0.0f;
    }
  }
  __device__ __forceinline__ void add(Word4 key, Word4 value, const float* query, bool there) {
    float k[8], v[8];
    unpack(key, k);
    unpack(value, v);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const Float4 q0 = *(const Float4*)(query + g * HEAD_DIM), q1 = *(const Float4*)(query + g * HEAD_DIM + 4);
      float score = k[0] * q0.x + k[1] * q0.y + k[2] * q0.z + k[3] * q0.w + k[4] * q1.x + k[5] * q1.y + k[6] * q1.z + k[7] * q1.w;
#pragma unroll
      for (int o = LANES / 2; o; o >>= 1) score += __shfl_xor_sync(~0u, score, o);
      if (!there) score = LOWEST;
      const float most = fmaxf(largest[g], score), before = exp2f(largest[g] - most), now = there ? exp2f(score - most) : 0.0f;
      largest[g] = most;
      weight[g] = weight[g] * before + now;
#pragma unroll
      for (int i = 0; i < 8; i++) sums[g][i] = sums[g][i] * before + now * v[i];
    }
  }
  // Several positions at once: what was summed up is scaled once for all of them.
  template <int count> __device__ __forceinline__ void add(
      const Word4 (&keys)[count], const Word4 (&values)[count], const float* query, const bool (&there)[count]) {
    float scores[count][GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const Float4 q0 = *(const Float4*)(query + g * HEAD_DIM), q1 = *(const Float4*)(query + g * HEAD_DIM + 4);
#pragma unroll
      for (int i = 0; i < count; i++) {
        float k[8];
        unpack(keys[i], k);
        scores[i][g] = k[0] * q0.x + k[1] * q0.y + k[2] * q0.z + k[3] * q0.w + k[4] * q1.x + k[5] * q1.y + k[6] * q1.z + k[7] * q1.w;
      }
    }
#pragma unroll
    for (int o = LANES / 2; o; o >>= 1)
#pragma unroll
      for (int i = 0; i < count; i++)
#pragma unroll
        for (int g = 0; g < GROUP; g++) scores[i][g] += __shfl_xor_sync(~0u, scores[i][g], o);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float most = largest[g];
#pragma unroll
      for (int i = 0; i < count; i++)
        if (there[i]) most = fmaxf(most, scores[i][g]);
      const float before = exp2f(largest[g] - most);
      largest[g] = most;
      weight[g] *= before;
#pragma unroll
      for (int i = 0; i < 8; i++) sums[g][i] *= before;
#pragma unroll
      for (int i = 0; i < count; i++) {
        scores[i][g] = there[i] ? exp2f(scores[i][g] - most) : 0.0f;
        weight[g] += scores[i][g];
      }
    }
#pragma unroll
    for (int i = 0; i < count; i++) {
      float v[8];
      unpack(values[i], v);
#pragma unroll
      for (int g = 0; g < GROUP; g++)
#pragma unroll
        for (int e = 0; e < 8; e++) sums[g][e] += scores[i][g] * v[e];
    }
  }
};

// qkv (B, QKV) float32; last_index (B,), the new token's position; keys, values (B, K, length, E), which get it;
// cos, sin (S, E / 2); parts: scratch; done (B, K), zeros, and zeros again afterwards; out (B, H * E)
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, ATTENTION_BLOCKS) attend(
    const float* qkv, const int* last_index, int length, u16* keys, u16* values, const u16* cos, const u16* sin, float* parts, u32* done, u16* out) {
  __shared__ alignas(16) float query[GROUP * HEAD_DIM];
  __shared__ alignas(16) u16 new_key[HEAD_DIM], new_value[HEAD_DIM];
  __shared__ alignas(16) float records[TEAMS * GROUP * RECORD];
  __shared__ float shares[SPLITS * GROUP];
  __shared__ bool is_last;
  const int head = blockIdx.x, split = blockIdx.y, b = blockIdx.z, team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  let_next_start();
  // Neither the position nor what older tokens left in the cache is of the kernels before.
  const int position = last_index[b], count = position + 1;
  constexpr int STEP = TEAMS * AHEAD;
  const int span = max(((count + SPLITS - 1) / SPLITS + STEP - 1) / STEP, TURNS) * STEP, active = (count + span - 1) / span;
  if (split >= active) return;
  const int end = min(position, (split + 1) * span);  // of the older ones
  const i64 offset = ((i64)b * KV_HEADS + head) * length * HEAD_DIM;
  const u16 *own_keys = keys + offset + lane * 8, *own_values = values + offset + lane * 8;
  Word4 k[AHEAD], v[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    const int at = split * span + i * TEAMS + team;
    k[i] = v[i] = Word4{};
    if (at < end) { k[i] = load_weights(own_keys + (i64)at * HEAD_DIM); v[i] = load_weights(own_values + (i64)at * HEAD_DIM); }
  }
  cos += (i64)position * (HEAD_DIM / 2);
  sin += (i64)position * (HEAD_DIM / 2);
  wait_for_last();
  const float* row = qkv + (i64)b * QKV;
  for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += ATTENTION_THREADS)
    query[i] = widen(narrow(turned(row + (head * GROUP + i / HEAD_DIM) * HEAD_DIM, i % HEAD_DIM, cos, sin))) * (SCALE * LOG2_E);
  const bool has_new = split == active - 1;
  if (has_new) {
    for (int e = threadIdx.x; e < HEAD_DIM; e += ATTENTION_THREADS) {
      new_key[e] = narrow(turned(row + (HEADS + head) * HEAD_DIM, e, cos, sin));
      new_value[e] = narrow(load_fresh1(row + (HEADS + KV_HEADS + head) * HEAD_DIM + e));
      keys[offset + (i64)position * HEAD_DIM + e] = new_key[e];
      values[offset + (i64)position * HEAD_DIM + e] = new_value[e];
    }
  }
  __syncthreads();
  Running running;
  for (int base = split * span; base < end; base += STEP) {
    if (base > split * span) {
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int at = base + i * TEAMS + team;
        if (at < end) { k[i] = load_weights(own_keys + (i64)at * HEAD_DIM); v[i] = load_weights(own_values + (i64)at * HEAD_DIM); }
      }
    }
    bool there[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) there[i] = base + i * TEAMS + team < end;
    running.add(k, v, query + lane * 8, there);
  }
  if (has_new) running.add(*(const Word4*)(new_key + lane * 8), *(const Word4*)(new_value + lane * 8), query + lane * 8, team == 0);
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    float* record = records + (team * GROUP + g) * RECORD;
#pragma unroll
    for (int i = 0; i < 8; i++) record[lane * 8 + i] = running.sums[g][i];
    if (lane == 0) { record[HEAD_DIM] = running.weight[g]; record[HEAD_DIM + 1] = running.largest[g]; }
  }
  __syncthreads();
  float* own_parts = parts + ((i64)b * KV_HEADS + head) * SPLITS * GROUP * RECORD;
  u16* own_out = out + (i64)b * HEADS * HEAD_DIM;
  for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += ATTENTION_THREADS) {
    const int g = i / HEAD_DIM, e = i % HEAD_DIM;
    float largest = LOWEST, weight = 0.0f, sum = 0.0f;
#pragma unroll
    for (int t = 0; t < TEAMS; t++) largest = fmaxf(largest, records[(t * GROUP + g) * RECORD + HEAD_DIM + 1]);
#pragma unroll
    for (int t = 0; t < TEAMS; t++) {
      const float* record = records + (t * GROUP + g) * RECORD;
      const float share = exp2f(record[HEAD_DIM + 1] - largest);
      weight += share * record[HEAD_DIM];
      sum += share * record[e];
    }
    if (active == 1) {
      own_out[place<BITS>((head * GROUP + g) * HEAD_DIM + e)] = narrow(sum / weight);
    } else {
      float* record = own_parts + (split * GROUP + g) * RECORD;
      record[e] = sum;
      if (e == 0) { record[HEAD_DIM] = weight; record[HEAD_DIM + 1] = largest; }
    }
  }
  if (active == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(done + b * KV_HEADS + head, 1u) == active - 1;
    if (is_last) done[b * KV_HEADS + head] = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  float* largest_of = records;  // (active, GROUP) each; the records are done with
  float* weight_of = records + SPLITS * GROUP;
  for (int i = threadIdx.x; i < active * GROUP; i += ATTENTION_THREADS) {
    weight_of[i] = load_fresh1(own_parts + i * RECORD + HEAD_DIM);
    largest_of[i] = load_fresh1(own_parts + i * RECORD + HEAD_DIM + 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < active * GROUP; i += ATTENTION_THREADS) {
    float largest = LOWEST, weight = 0.0f;
    for (int s = 0; s < active; s++) largest = fmaxf(largest, largest_of[s * GROUP + i % GROUP]);
    for (int s = 0; s < active; s++) weight += exp2f(largest_of[s * GROUP + i % GROUP] - largest) * weight_of[s * GROUP + i % GROUP];
    shares[i] = exp2f(largest_of[i] - largest) / weight;
  }
  __syncthreads();
  for (int i = threadIdx.x * 4; i < GROUP * HEAD_DIM; i += ATTENTION_THREADS * 4) {
    const int g = i / HEAD_DIM, e = i % HEAD_DIM;
    float sum[4] = {};
#pragma unroll 8
    for (int s = 0; s < active; s++) {
      const Float4 part = load_fresh4(own_parts + (s * GROUP + g) * RECORD + e);
      const float share = shares[s * GROUP + g];
      sum[0] += share * part.x; sum[1] += share * part.y; sum[2] += share * part.z; sum[3] += share * part.w;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) own_out[place<BITS>((head * GROUP + g) * HEAD_DIM + e + j)] = narrow(sum[j]);
  }
}
