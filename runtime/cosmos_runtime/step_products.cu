// ---- weights that come in a stream ----
//
// One warp has the rows of all matrices copied to shared memory, in the order in which they will be wanted, as fast as
// room becomes free there: stage by stage, each some rows of 8 and some of their columns. The others multiply what has
// come. So the memory goes on while blocks wait for each other.

struct alignas(16) Stage { u8 bytes[STAGE_BYTES]; };
struct Arrivals { u64 full[STAGES], empty[STAGES]; };

__device__ __forceinline__ void prepare_arrivals(Arrivals& a) {
  for (int i = 0; i < STAGES; i++) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(&a.full[i])) : "memory");
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(&a.empty[i])), "n"(STEP_WARPS) : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void wait_for(u64* arrival, u32 parity) {
  asm volatile(
      "{\n.reg .pred there;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n@there bra done;\nbra again;\ndone:\n}"
      :: "r"(shared_address(arrival)), "r"(parity) : "memory");
}
__device__ __forceinline__ void copy_row(void* to, const void* from, u32 bytes, u64* arrival) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(arrival)) : "memory");
}

// m16n8k16: A is 16 rows of a matrix, B the input.
__device__ __forceinline__ void multiply_rows(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Eight levels of 16 bytes, as `Input` says.
template <int bits> __device__ __forceinline__ void levels(Word4 w, int part, u32 (&b)[4]) {
  if constexpr (bits == 8) {
    const u32 first = part ? w.z : w.x, second = part ? w.w : w.y;
    b[0] = __byte_perm(first, 0x64646464, 0x4140); b[1] = __byte_perm(first, 0x64646464, 0x4342);
    b[2] = __byte_perm(second, 0x64646464, 0x4140); b[3] = __byte_perm(second, 0x64646464, 0x4342);
  } else {
    const u32 word = part == 0 ? w.x : part == 1 ? w.y : part == 2 ? w.z : w.w, shifted = word >> 8;
    constexpr int AND_OR = (0xf0 & 0xcc) | 0xaa;
    b[0] = lop3<AND_OR>(word, 0x000f000f, 0x64006400); b[1] = lop3<AND_OR>(word, 0x00f000f0, 0x64006400);
    b[2] = lop3<AND_OR>(shifted, 0x000f000f, 0x64006400); b[3] = lop3<AND_OR>(shifted, 0x00f000f0, 0x64006400);
  }
}

// Bytes of a stage for one row of so many parts of its columns. Rows are 64 bytes further apart than they are long, and
// their scales 16, so that neighbours lie in different banks.
__device__ constexpr int row_room(int row, int scales, int chunks) { return row / chunks + 64 + scales / chunks + 16; }
__device__ constexpr int chunks_of(int row, int scales, int rows) {
  int chunks = 1;
  while (rows * row_room(row, scales, chunks) > STAGE_BYTES) chunks *= 2;
  return chunks;
}

// `parts` matrices (n, k) one above the other, in stages: TILES eights of rows of each, k / CHUNKS columns of them. A
// warp multiplies two eights at once; several stages are multiplied at once, by a share of the warps each, where a block
// has few of them.
template <int bits, int block, int k, int n, int parts> struct Streamed {
  static constexpr int OWN = 128 / bits, PIECE = 4 * OWN;  // columns of a lane, of four that read one row
  static constexpr int ROW = k * bits / 8, SCALE_ROW = k / block * 2;
  static constexpr int OF_BLOCK = (n / 8 + GRID - 1) / GRID;  // eights of rows of a block, at most
  static constexpr int CHUNKS = chunks_of(ROW, SCALE_ROW, parts * 16);
  static constexpr int ROW_BYTES = ROW / CHUNKS, SCALE_BYTES = SCALE_ROW / CHUNKS;
  static constexpr int ROW_STRIDE = ROW_BYTES + 64, SCALE_STRIDE = SCALE_BYTES + 16;
  static constexpr int FIT = STAGE_BYTES / (parts * 16 * row_room(ROW, SCALE_ROW, CHUNKS)) * 2;
  static constexpr int MOST = FIT < 4 / parts ? FIT : 4 / parts;
  static constexpr int TILES = MOST < OF_BLOCK ? MOST : OF_BLOCK, OWN_TURNS = (OF_BLOCK + TILES - 1) / TILES;
  static constexpr int EIGHTS = parts * TILES, PAIRS = (EIGHTS + 1) / 2;
  static constexpr int TURNS_AT_ONCE = OWN_TURNS * CHUNKS <= (STAGES < 4 ? STAGES : 4) && STEP_WARPS % (OWN_TURNS * CHUNKS) == 0 ? OWN_TURNS : 1;
  static constexpr int AT_ONCE = TURNS_AT_ONCE * CHUNKS, ROUNDS = OWN_TURNS / TURNS_AT_ONCE;
  static constexpr int WARPS_OF_STAGE = STEP_WARPS / AT_ONCE;
  static constexpr int PIECES = k / CHUNKS / PIECE, LOADS = (PIECES + WARPS_OF_STAGE - 1) / WARPS_OF_STAGE;
  static constexpr int UNROLL = LOADS < 4 / PAIRS ? LOADS : 4 / PAIRS;  // little code, which is read anew for each layer
  static constexpr int RESULTS = TURNS_AT_ONCE * TILES * 8;
  static_assert(n % 8 == 0 && k % (CHUNKS * PIECE) == 0 && ROW_BYTES % 16 == 0 && SCALE_BYTES % 16 == 0, "shape");
  static_assert(WARPS_OF_STAGE * AT_ONCE == STEP_WARPS && RESULTS <= STEP_THREADS && AT_ONCE <= STAGES, "warps");
  static_assert(PAIRS * 16 * (ROW_STRIDE + SCALE_STRIDE) <= STAGE_BYTES, "stage");

  static __device__ __forceinline__ int tile(int i) { return own_block() + i * GRID; }

  // What the copying warp does: `count` stages have been filled before.
  static __device__ __forceinline__ void fetch(const u8* matrix, const u16* scales, Stage* stages, Arrivals& arrivals, u32& count) {
    const int lane = own_thread() & 31;
#pragma unroll 1
    for (int turn = 0; turn < OWN_TURNS; turn++) {
      int valid = 0;
#pragma unroll
      for (int t = 0; t < TILES; t++) valid += tile(turn * TILES + t) < n / 8;
#pragma unroll 1
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const u32 slot = count % STAGES;
        u64* full = &arrivals.full[slot];
        wait_for(&arrivals.empty[slot], (count / STAGES & 1) ^ 1);
        if (lane == 0)
          asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(full)), "r"(valid * parts * 8 * (ROW_BYTES + SCALE_BYTES)) : "memory");
        __syncwarp();
        u8* stage = stages[slot].bytes;
#pragma unroll
        for (int r = lane; r < EIGHTS * 8; r += 32) {
          const int own = tile(turn * TILES + r / 8 % TILES);
          if (own < n / 8) {
            const i64 row = (i64)(r / 8 / TILES) * n + own * 8 + r % 8;
            copy_row(stage + r * ROW_STRIDE, matrix + row * ROW + chunk * ROW_BYTES, ROW_BYTES, full);
            copy_row(stage + EIGHTS * 8 * ROW_STRIDE + r * SCALE_STRIDE, (const u8*)scales + row * SCALE_ROW + chunk * SCALE_BYTES, SCALE_BYTES, full);
          }
        }
        count++;
      }
    }
  }

  // The rows of a stage times the piece of the input that is number `own`: a lane has 16 bytes of every eighth row. The
  // four lanes that read one row have a column of B each, x where their columns are and zeros elsewhere, since their
  // scales differ.
  static __device__ __forceinline__ void multiply(const u8* rows, const u8* scales, int lane, int own, Input in, float (&sums)[PAIRS][2]) {
    Word4 first[PAIRS], second[PAIRS];
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
      first[p] = *(const Word4*)(rows + p * 16 * ROW_STRIDE);
      second[p] = *(const Word4*)(rows + (p * 16 + 8) * ROW_STRIDE);
    }
    const bool has = lane / 4 == 2 * (lane & 3);
    const u16* x = in.x + own * PIECE + (lane & 3) * OWN;
    const float offset = -in.offsets[own * 4 + (lane & 3)];
    float one[PAIRS][4], other[PAIRS][4];  // two, so that half as many products wait for one another
#pragma unroll
    for (int p = 0; p < PAIRS; p++)
#pragma unroll
      for (int i = 0; i < 4; i++) { one[p][i] = i % 2 ? 0.0f : offset; other[p][i] = 0.0f; }
#pragma unroll
    for (int part = 0; part < OWN / 8; part++) {
      Word4 b = {};
      if (has) b = *(const Word4*)(x + 8 * part);
#pragma unroll
      for (int p = 0; p < PAIRS; p++) {
        u32 upper[4], lower[4];
        levels<bits>(first[p], part, upper);
        levels<bits>(second[p], part, lower);
        multiply_rows(one[p], upper[0], lower[0], upper[1], lower[1], b.x, b.y);
        multiply_rows(other[p], upper[2], lower[2], upper[3], lower[3], b.z, b.w);
      }
    }
#pragma unroll
    for (int p = 0; p < PAIRS; p++)
#pragma unroll
      for (int i = 0; i < 2; i++) sums[p][i] += widen(*(const u16*)(scales + (p * 16 + i * 8) * SCALE_STRIDE)) * (one[p][2 * i] + other[p][2 * i]);
  }

  // What the other warps do. `finish(which of the block's rows, row of each matrix, its sums)` for every row, by one
  // thread; eight neighbours have eight rows. shared: (2, STEP_WARPS, 32)
  template <class Finish> static __device__ __forceinline__ void product(
      Input in, float* shared, Stage* stages, Arrivals& arrivals, u32& count, const Finish& finish) {
    const int thread = own_thread(), warp = thread / 32, lane = thread & 31;
    const int stage_of = warp / WARPS_OF_STAGE, part = warp % WARPS_OF_STAGE, chunk = stage_of % CHUNKS;
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
      float sums[PAIRS][2] = {};
      const u32 at = count + stage_of, slot = at % STAGES;
      wait_for(&arrivals.full[slot], at / STAGES & 1);
      const u8* rows = stages[slot].bytes + lane / 4 * ROW_STRIDE + (lane & 3) * 16;
      const u8* scales = stages[slot].bytes + EIGHTS * 8 * ROW_STRIDE + lane / 4 * SCALE_STRIDE + (lane & 3) * OWN / block * 2;
#pragma unroll UNROLL
      for (int load = 0; load < LOADS; load++) {
        const int piece = load * WARPS_OF_STAGE + part;
        if (PIECES % WARPS_OF_STAGE == 0 || piece < PIECES)
          multiply(rows + piece * 64, scales + piece * (PIECE / block) * 2, lane, chunk * PIECES + piece, in, sums);
      }
      __syncwarp();
      if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(&arrivals.empty[slot])), "n"(AT_ONCE) : "memory");
      count += AT_ONCE;
      float* of_warps = shared + (round & 1) * STEP_WARPS * 32;
#pragma unroll
      for (int p = 0; p < PAIRS; p++) {
#pragma unroll
        for (int o = 1; o < 4; o *= 2)
#pragma unroll
          for (int i = 0; i < 2; i++) sums[p][i] += __shfl_xor_sync(~0u, sums[p][i], o);
        if ((lane & 3) < 2) of_warps[warp * 32 + (p * 2 + (lane & 3)) * 8 + lane / 4] = lane & 1 ? sums[p][1] : sums[p][0];
      }
      together();
      const int i = (thread - 32 * round) & (STEP_THREADS - 1);  // another warp each round puts sums together
      const int turn = i / (TILES * 8), local = round * RESULTS + i, row = tile(local / 8) * 8 + i % 8;
      if (i < RESULTS && row < n) {
        float total[parts] = {};
#pragma unroll
        for (int p = 0; p < parts; p++) {
          const int at = (p * TILES + i / 8 % TILES) * 8 + i % 8;
#pragma unroll
          for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int w = 0; w < WARPS_OF_STAGE; w++) total[p] += of_warps[((turn * CHUNKS + c) * WARPS_OF_STAGE + w) * 32 + at];
        }
        finish(local, row, total);
      }
    }
  }
};

typedef Streamed<BITS, BLOCK, DIM, QKV, 1> QkvRows;
typedef Streamed<BITS, BLOCK, WIDTH, DIM, 1> OutRows;
typedef Streamed<BITS, BLOCK, DIM, HIDDEN, 2> GateRows;
typedef Streamed<BITS, BLOCK, HIDDEN, DIM, 1> DownRows;
typedef Streamed<HEAD_BITS, HEAD_BLOCK, DIM, VOCAB, 1> LogitRows;
