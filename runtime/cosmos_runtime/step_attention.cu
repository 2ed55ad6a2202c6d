// ---- what a block knows ----

struct Layer {
  const u16* norm1;
  const u8* qkv; const u16* qkv_scales;
  const u8* out; const u16* out_scales;
  const u16* norm2;
  const u8* gate_up; const u16* gate_up_scales;
  const u8* down; const u16* down_scales;
  u16 *keys, *values;  // (K, length, E)
};
struct Step {
  const i64* tokens;      // (1,)
  const int* last_index;  // (1,), the new token's position
  float* logits;          // (V,)
  i64 length;
  const Layer* layers;
  const u8* table; const u16* table_scales;
  const u16 *norm, *cos, *sin;
  // What blocks give each other: hidden states before and after the attention's output is added, queries, keys and
  // values, parts of the attention (K, PARTS, GROUP, RECORD), and the inputs of output and down.
  u32 *hidden, *middle, *qkv, *parts, *attended, *gated;
  u32* turn;  // tags up to this one are used
};

#define MOST_COLUMNS (HIDDEN > WIDTH ? (HIDDEN > DIM ? HIDDEN : DIM) : (WIDTH > DIM ? WIDTH : DIM))

// Of the attention, which has no other use for a product's input meanwhile.
struct AttentionMemory {
  float query[GROUP * HEAD_DIM];
  alignas(16) u16 new_key[HEAD_DIM], new_value[HEAD_DIM];
  float records[STEP_WARPS * GROUP * RECORD];
};
struct alignas(16) Everything {
  Stage stages[STAGES];
  union {
    alignas(16) u16 x[MOST_COLUMNS];
    AttentionMemory attention;
  };
  alignas(16) float offsets[MOST_COLUMNS / 16];
  float sums[2 * STEP_WARPS * 32];
  float scratch[STEP_WARPS];
  float found[3][GROUP * HEAD_DIM];            // of all parts: values, weights, largest scores
  float hidden[(DIM / 8 + GRID - 1) / GRID * 8];  // of the rows of output and down that this block has
  float cos[HEAD_DIM / 2], sin[HEAD_DIM / 2];
  Arrivals arrivals;
  Layer layers[LAYERS];
  Step step;
  int position;
  u32 turn;
};
static_assert(sizeof(Everything) <= WHOLE_SHARED, "shared memory is what the host asks for");

extern __shared__ Word4 whole_memory[];
__device__ __forceinline__ Everything& everything() { return *(Everything*)whole_memory; }
__device__ __forceinline__ Input input() { return {everything().x, everything().offsets}; }

// Element i of a token's row of the table, as the model sees it.
__device__ __forceinline__ float embedded(i64 token, int i, const u8* table, const u16* scales) {
  const i64 at = token * DIM + i;
  const int level = HEAD_BITS == 8 ? table[at] : (table[at / 2] >> (4 * (at & 1))) & 15;
  return widen(narrow((level - (1 << (HEAD_BITS - 1))) * widen(scales[at / HEAD_BLOCK])));
}

// ---- attention ----

#define READ_AHEAD 2  // positions of a team
#define OWN_CHANNELS (GROUP * HEAD_DIM / PARTS)  // of the group's heads, that one part puts together
static_assert(OWN_CHANNELS % 8 == 0 && OWN_CHANNELS <= STEP_THREADS && HEAD_DIM % OWN_CHANNELS == 0, "parts");

// One part of one key/value head's positions.
struct Part {
  const int thread, head, part, position, span, start, end;
  u16 *keys, *values;  // (length, E), of the head
  Word4 k[READ_AHEAD], v[READ_AHEAD];

  __device__ __forceinline__ Part(const Layer& layer, int position, i64 length)
      : thread(own_thread()), head(own_block() / PARTS), part(own_block() % PARTS), position(position),
        span((position + PARTS) / PARTS), start(part * span), end(min(position + 1, start + span)) {
    keys = layer.keys + head * length * HEAD_DIM;
    values = layer.values + head * length * HEAD_DIM;
  }
  __device__ __forceinline__ int at(int base, int i) const { return base + i * STEP_TEAMS + thread / LANES; }
  __device__ __forceinline__ bool has_new() const { return start <= position && position < end; }

  __device__ __forceinline__ void read(int base) {
#pragma unroll
    for (int i = 0; i < READ_AHEAD; i++) {
      k[i] = v[i] = Word4{};
      if (at(base, i) < min(end, position)) {
        const i64 from = (i64)at(base, i) * HEAD_DIM + thread % LANES * 8;
        k[i] = load_weights(keys + from);
        v[i] = load_weights(values + from);
      }
    }
  }
  // The group's queries, and the new key and value if they are this part's, all turned as they must be.
  __device__ __forceinline__ void take_heads(AttentionMemory& memory, const u32* qkv, u32 tag) {
    constexpr int ITEMS = ((GROUP + 2) * HEAD_DIM + STEP_THREADS - 1) / STEP_THREADS, half = HEAD_DIM / 2;
    const int count = (has_new() ? GROUP + 2 : GROUP) * HEAD_DIM;
    const auto item = [&](int j) { return min(thread + j * STEP_THREADS, count - 1); };
    OneFloat found[2 * ITEMS];
    take([&](int j) {
      const int i = item(j / 2), h = i / HEAD_DIM, e = i % HEAD_DIM;
      const int row = h < GROUP ? head * GROUP + h : HEADS + (h - GROUP) * KV_HEADS + head;
      return qkv + row * HEAD_DIM + (j % 2 == 0 ? e : e < half ? e + half : e - half);
    }, found, tag);
    const Everything& all = everything();
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
      const int i = item(j), h = i / HEAD_DIM, e = i % HEAD_DIM;
      const float value = found[2 * j].value, other = found[2 * j + 1].value;
      const float turned = value * all.cos[e % half] + (e < half ? -other : other) * all.sin[e % half];
      const i64 own = (i64)position * HEAD_DIM + e;
      if (h < GROUP) memory.query[i] = widen(narrow(turned)) * (SCALE * LOG2_E);
      else if (h == GROUP) keys[own] = memory.new_key[e] = narrow(turned);
      else values[own] = memory.new_value[e] = narrow(value);
    }
    together();
  }
  __device__ __forceinline__ void attend(AttentionMemory& memory) {
    const int lane = thread % LANES;
    Running running;
#pragma unroll 1
    for (int base = start; base < end; base += READ_AHEAD * STEP_TEAMS) {
      if (base > start) read(base);
#pragma unroll
      for (int i = 0; i < READ_AHEAD; i++) {
        if (base + i * STEP_TEAMS >= end) break;
        if (at(base, i) == position && has_new()) {
          k[i] = *(const Word4*)(memory.new_key + lane * 8);
          v[i] = *(const Word4*)(memory.new_value + lane * 8);
        }
        running.add(k[i], v[i], memory.query + lane * 8, at(base, i) < end);
      }
    }
    join_teams(running);
    if ((thread & 31) >= LANES) return;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float* record = memory.records + (thread / 32 * GROUP + g) * RECORD;
#pragma unroll
      for (int i = 0; i < 8; i++) record[lane * 8 + i] = running.sums[g][i];
      if (lane == 0) { record[HEAD_DIM] = running.weight[g]; record[HEAD_DIM + 1] = running.largest[g]; }
    }
  }
  // Every team of a warp then has what all of them found.
  static __device__ __forceinline__ void join_teams(Running& running) {
#pragma unroll
    for (int o = LANES; o < 32; o *= 2)
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        const float other = __shfl_xor_sync(~0u, running.largest[g], o), most = fmaxf(running.largest[g], other);
        const float share = exp2f(running.largest[g] - most), of_other = exp2f(other - most);
        running.largest[g] = most;
        running.weight[g] = running.weight[g] * share + __shfl_xor_sync(~0u, running.weight[g], o) * of_other;
#pragma unroll
        for (int i = 0; i < 8; i++) running.sums[g][i] = running.sums[g][i] * share + __shfl_xor_sync(~0u, running.sums[g][i], o) * of_other;
      }
  }
  __device__ __forceinline__ u32* record(u32* parts, int part, int g) const { return parts + ((head * PARTS + part) * GROUP + g) * RECORD; }

  // What this part's warps found, for all parts of the head.
  __device__ __forceinline__ void give_found(const AttentionMemory& memory, u32* parts, u32 tag) {
    for (int i = thread; i < GROUP * HEAD_DIM; i += STEP_THREADS) {
      const int g = i / HEAD_DIM, e = i % HEAD_DIM;
      float largest = LOWEST, weight = 0.0f, sum = 0.0f;
#pragma unroll
      for (int w = 0; w < STEP_WARPS; w++) largest = fmaxf(largest, memory.records[(w * GROUP + g) * RECORD + HEAD_DIM + 1]);
#pragma unroll
      for (int w = 0; w < STEP_WARPS; w++) {
        const float* of_warp = memory.records + (w * GROUP + g) * RECORD;
        const float share = exp2f(of_warp[HEAD_DIM + 1] - largest);
        weight += share * of_warp[HEAD_DIM];
        sum += share * of_warp[e];
      }
      u32* own = record(parts, part, g);
      OneFloat::give(own + e, sum, tag);
      if (e == 0) { OneFloat::give(own + HEAD_DIM, weight, tag); OneFloat::give(own + HEAD_DIM + 1, largest, tag); }
    }
  }
  // What all parts found in this one's channels, put together, for everybody.
  __device__ __forceinline__ void give_joined(const u32* parts, u32* attended, u32 tag) {
    constexpr int ITEMS = (GROUP * HEAD_DIM + STEP_THREADS - 1) / STEP_THREADS;
    Everything& all = everything();
    const auto item = [&](int j) { return min(thread + j * STEP_THREADS, GROUP * HEAD_DIM - 1); };
    const int g = part * OWN_CHANNELS / HEAD_DIM, first = part * OWN_CHANNELS % HEAD_DIM;
    OneFloat found[3 * ITEMS];
    take([&](int j) {
      const int i = item(j / 3);
      const u32* of_part = record((u32*)parts, i / OWN_CHANNELS, g);
      return of_part + (j % 3 == 0 ? first + i % OWN_CHANNELS : HEAD_DIM + j % 3 - 1);
    }, found, tag);
#pragma unroll
    for (int j = 0; j < ITEMS; j++)
#pragma unroll
      for (int f = 0; f < 3; f++) all.found[f][item(j)] = found[3 * j + f].value;
    together();
    if (thread >= OWN_CHANNELS) return;
    float largest = LOWEST, weight = 0.0f, sum = 0.0f;
#pragma unroll
    for (int s = 0; s < PARTS; s++) largest = fmaxf(largest, all.found[2][s * OWN_CHANNELS + thread]);
#pragma unroll
    for (int s = 0; s < PARTS; s++) {
      const int i = s * OWN_CHANNELS + thread;
      const float share = exp2f(all.found[2][i] - largest);
      weight += share * all.found[1][i];
      sum += share * all.found[0][i];
    }
    give_input<BITS>(attended, (head * GROUP + g) * HEAD_DIM + first + thread, sum / weight, tag);
  }
};
