template <class R, class Finish> __device__ __forceinline__ void multiply(u32& count, const Finish& finish) {
  Everything& all = everything();
  R::product(input(), all.sums, all.stages, all.arrivals, count, finish);
}
template <class R> __device__ __forceinline__ void fetch(const u8* matrix, const u16* scales, u32& count) {
  R::fetch(matrix, scales, everything().stages, everything().arrivals, count);
}

// What the copying warp does.
__device__ __forceinline__ void fetch_all() {
  const Everything& all = everything();
  u32 count = 0;
#pragma unroll 1
  for (int index = 0; index < LAYERS; index++) {
    const Layer& layer = all.layers[index];
    fetch<QkvRows>(layer.qkv, layer.qkv_scales, count);
    fetch<OutRows>(layer.out, layer.out_scales, count);
    fetch<GateRows>(layer.gate_up, layer.gate_up_scales, count);
    fetch<DownRows>(layer.down, layer.down_scales, count);
  }
  fetch<LogitRows>(all.step.table, all.step.table_scales, count);
}

// ---- the parts of a layer ----
//
// `count` stages of weights have been used before.

__device__ __forceinline__ void qkv_part(int index, u32 tag, u32& count) {
  const Everything& all = everything();
  const NormedInput<BITS> norm(all.layers[index].norm1);
  float values[NormedInput<BITS>::OWN][8];
  if (index > 0) {
    norm.take_hidden(all.step.hidden, tag - 1, values);
  } else {
    const i64 token = *all.step.tokens;
#pragma unroll
    for (int i = 0; i < NormedInput<BITS>::OWN; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) values[i][e] = norm.column(i) < DIM ? embedded(token, norm.column(i) + e, all.step.table, all.step.table_scales) : 0.0f;
  }
  norm.write(values, input(), everything().scratch);
  u32* qkv = all.step.qkv;
  multiply<QkvRows>(count, [&](int, int row, float (&sum)[1]) { OneFloat::give(qkv + row, sum[0], tag); });
}

__device__ __forceinline__ void attention_part(int index, u32 tag) {
  if (own_block() >= KV_HEADS * PARTS) return;
  Everything& all = everything();
  Part part(all.layers[index], all.position, all.step.length);
  part.read(part.start);
  part.take_heads(all.attention, all.step.qkv, tag);
  part.attend(all.attention);
  together();
  part.give_found(all.attention, all.step.parts, tag);
  part.give_joined(all.step.parts, all.step.attended, tag);
}

// The block's hidden states += the input times a matrix, for everybody.
template <class R> __device__ __forceinline__ void add_product(u32* hidden, u32 tag, u32& count) {
  float* own = everything().hidden;
  multiply<R>(count, [&](int local, int row, float (&sum)[1]) { OneFloat::give(hidden + hidden_at(row), own[local] += sum[0], tag); });
}

__device__ __forceinline__ void out_part(int index, u32 tag, u32& count) {
  const Step& step = everything().step;
  take_input<BITS, WIDTH>(step.attended, input(), tag);
  add_product<OutRows>(step.middle, tag, count);
}

__device__ __forceinline__ void gate_part(int index, u32 tag, u32& count) {
  const Everything& all = everything();
  const NormedInput<BITS> norm(all.layers[index].norm2);
  float values[NormedInput<BITS>::OWN][8];
  norm.take_hidden(all.step.middle, tag, values);
  norm.write(values, input(), everything().scratch);
  u32* gated = all.step.gated;
  multiply<GateRows>(count, [&](int, int row, float (&sum)[2]) {
    give_input<BITS>(gated, row, sum[0] / (1.0f + __expf(-sum[0])) * sum[1], tag);
  });
}

__device__ __forceinline__ void down_part(int index, u32 tag, u32& count) {
  const Step& step = everything().step;
  take_input<BITS, HIDDEN>(step.gated, input(), tag);
  add_product<DownRows>(step.hidden, tag, count);
}

__device__ __forceinline__ void logits_part(u32 tag, u32& count) {
  const Everything& all = everything();
  const NormedInput<HEAD_BITS> norm(all.step.norm);
  float values[NormedInput<HEAD_BITS>::OWN][8];
  norm.take_hidden(all.step.hidden, tag, values);
  norm.write(values, input(), everything().scratch);
  float* logits = all.step.logits;
  multiply<LogitRows>(count, [&](int, int row, float (&sum)[1]) { logits[row] = sum[0]; });
}

// What the step needs of what does not change within it.
__device__ __forceinline__ void prepare(Everything& all, const Step* given) {
  for (int i = threadIdx.x; i < (int)sizeof(Step) / 8; i += BLOCK_THREADS) ((i64*)&all.step)[i] = ((const i64*)given)[i];
  if (threadIdx.x == 0) prepare_arrivals(all.arrivals);
  __syncthreads();
  const Step& step = all.step;
  const int position = *step.last_index;
  if (threadIdx.x == 0) { all.position = position; all.turn = *step.turn; }
  for (int i = threadIdx.x; i < LAYERS * (int)sizeof(Layer) / 8; i += BLOCK_THREADS) ((i64*)all.layers)[i] = ((const i64*)step.layers)[i];
  for (int i = threadIdx.x; i < HEAD_DIM / 2; i += BLOCK_THREADS) {
    all.cos[i] = widen(step.cos[(i64)position * (HEAD_DIM / 2) + i]);
    all.sin[i] = widen(step.sin[(i64)position * (HEAD_DIM / 2) + i]);
  }
  const i64 token = *step.tokens;
  for (int i = threadIdx.x; i < (int)(sizeof(all.hidden) / 4); i += BLOCK_THREADS) {
    const int row = (blockIdx.x + i / 8 * GRID) * 8 + i % 8;
    if (row < DIM) all.hidden[i] = embedded(token, row, step.table, step.table_scales);
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) whole_step(const Step* given) {
  Everything& all = everything();
  prepare(all, given);
  if (threadIdx.x >= STEP_THREADS) {
    fetch_all();
    return;
  }
  u32 count = 0;
#pragma unroll 1
  for (int index = 0; index < LAYERS; index++) {
    const u32 tag = all.turn + index + 1;
    qkv_part(index, tag, count);
    attention_part(index, tag);
    out_part(index, tag, count);
    gate_part(index, tag, count);
    down_part(index, tag, count);
  }
  logits_part(all.turn + LAYERS, count);
  if (blockIdx.x == 0 && threadIdx.x == 0) *all.step.turn = all.turn + LAYERS;  // everybody has read it long ago
}
