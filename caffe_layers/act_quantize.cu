#include <algorithm>
#include <vector>

#include "caffe/layers/act_quantize.hpp"

namespace caffe {

namespace {

// Enough to fill any GPU; the kernels stride over the rest. Unlike
// CAFFE_GET_BLOCKS and CUDA_KERNEL_LOOP, neither this nor the size_t index can
// overflow for blobs of nearly 2^31 values.
const size_t kMaxBlocks = 65535;

int blocks_for(size_t count) {
  const size_t blocks =
      (count + CAFFE_CUDA_NUM_THREADS - 1) / CAFFE_CUDA_NUM_THREADS;
  return static_cast<int>(std::min(blocks, kMaxBlocks));
}

__device__ size_t first_index() {
  return blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
}

__device__ size_t index_stride() {
  return static_cast<size_t>(blockDim.x) * gridDim.x;
}

// The intrinsics round as the CPU does, even if nvcc is told to use fast
// maths: no approximate division, no fused multiply-add.
__device__ float code(float x, float step) {
  return floorf(__fadd_rn(__fdiv_rn(x, step), 0.5f));
}

__device__ double code(double x, double step) {
  return floor(__dadd_rn(__ddiv_rn(x, step), 0.5));
}

__device__ float product(float a, float b) { return __fmul_rn(a, b); }

__device__ double product(double a, double b) { return __dmul_rn(a, b); }

template <typename Dtype>
__global__ void ActQuantizeForward(const size_t count, const Dtype step,
                                   const Dtype lowest, const Dtype levels,
                                   const Dtype below, const Dtype above,
                                   const Dtype* in, Dtype* out,
                                   unsigned char* inside) {
  for (size_t i = first_index(); i < count; i += index_stride()) {
    const Dtype x = in[i];
    inside[i] = x > below && x < above ? 1 : 0;
    Dtype q = code(x, step);
    q = q < lowest ? lowest : q;
    q = q > levels ? levels : q;
    out[i] = product(step, q);
  }
}

template <typename Dtype>
__global__ void ActQuantizeBackward(const size_t count, const Dtype* out_diff,
                                    const unsigned char* inside,
                                    Dtype* in_diff) {
  for (size_t i = first_index(); i < count; i += index_stride()) {
    in_diff[i] = inside[i] != 0 ? out_diff[i] : Dtype(0);
  }
}

}  // namespace

template <typename Dtype>
void ActQuantizeLayer<Dtype>::Forward_gpu(const vector<Blob<Dtype>*>& bottom,
                                          const vector<Blob<Dtype>*>& top) {
  const size_t count = bottom[0]->count();
  if (count == 0) {  // a grid of 0 blocks is an error
    return;
  }
  const Dtype* bottom_data = bottom[0]->gpu_data();
  Dtype* top_data = top[0]->mutable_gpu_data();
  unsigned char* inside =
      static_cast<unsigned char*>(inside_->mutable_gpu_data());
  // NOLINT_NEXT_LINE(whitespace/operators)
  ActQuantizeForward<Dtype><<<blocks_for(count), CAFFE_CUDA_NUM_THREADS>>>(
      count, step_, lowest_, levels_, below_, above_, bottom_data, top_data,
      inside);
  CUDA_POST_KERNEL_CHECK;
}

template <typename Dtype>
void ActQuantizeLayer<Dtype>::Backward_gpu(const vector<Blob<Dtype>*>& top,
                                           const vector<bool>& propagate_down,
                                           const vector<Blob<Dtype>*>& bottom) {
  const size_t count = bottom[0]->count();
  if (!propagate_down[0] || count == 0) {
    return;
  }
  const Dtype* top_diff = top[0]->gpu_diff();
  const unsigned char* inside =
      static_cast<const unsigned char*>(inside_->gpu_data());
  Dtype* bottom_diff = bottom[0]->mutable_gpu_diff();
  // NOLINT_NEXT_LINE(whitespace/operators)
  ActQuantizeBackward<Dtype><<<blocks_for(count), CAFFE_CUDA_NUM_THREADS>>>(
      count, top_diff, inside, bottom_diff);
  CUDA_POST_KERNEL_CHECK;
}

INSTANTIATE_LAYER_GPU_FUNCS(ActQuantizeLayer);

}  // namespace caffe
