// The Walsh-Hadamard rotation of head vectors, one warp per vector: alone, for queries and outputs, and on the way into
// the fp16 columns of a cache. What would be three to twelve small operations per layer and token is one launch.
//
// Grids: vectors / 4; in `extend` with one row of blocks for keys and one for values.
// Inputs: x [vectors, D] T. `extend`: old columns [B H, T, D] half, new vectors [B H, L, D] T. Outputs: y as x; columns
// [B H, T + L, D] half: the old ones copied, the new ones rotated where the codec rotates, and clipped to fp16's range.
// Bytes moved: what is read and written.
#include "vector.cuh"

namespace opentq {

template <class T, int D>
__device__ __forceinline__ void rotate(const T* x, T* y, int vectors) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= vectors) return;
  Vector<D> v;
  v.load(x + (size_t)row * D, lane);
  v.rotate(lane);
  v.store(y + (size_t)row * D, lane);
}

template <class T, int D, bool ROTATED>
__device__ __forceinline__ void extend(const f16* old, const T* fresh, f16* out, int heads, int columns, int length) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32, all = columns + length;
  if (row >= heads * all) return;
  const int head = row / all, column = row % all;
  Vector<D> v;
  if (column < columns) {
    v.load(old + ((size_t)head * columns + column) * D, lane);
  } else {
    v.load(fresh + ((size_t)head * length + column - columns) * D, lane);
    if constexpr (ROTATED) v.rotate(lane);
    v.clip();
  }
  v.store(out + (size_t)row * D, lane);
}

}  // namespace opentq
