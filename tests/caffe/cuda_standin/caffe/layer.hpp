// As much of Caffe as the ActQuantize layer uses, over memory that CPU and GPU share, so that a machine with nothing
// but CUDA can run the layer's CPU and GPU code side by side. The other headers of this folder only include this one.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

namespace caffe {

using std::shared_ptr;
using std::string;
using std::vector;

// Ends the program with the streamed message, as glog's CHECK does.
struct Fatal {
  ~Fatal() {
    std::cerr << std::endl;
    std::abort();
  }
};

#define CHECK(condition) \
  if (condition) {       \
  } else                 \
    (Fatal(), std::cerr) << "Check failed: " #condition " "

#define CUDA_CHECK(condition)                  \
  do {                                         \
    const cudaError_t error = condition;       \
    CHECK(error == cudaSuccess)                \
        << cudaGetErrorString(error) << "\n";  \
  } while (0)
#define CUDA_POST_KERNEL_CHECK CUDA_CHECK(cudaPeekAtLastError())
const int CAFFE_CUDA_NUM_THREADS = 512;

class SyncedMemory {
 public:
  explicit SyncedMemory(size_t size) : size_(size) {
    CUDA_CHECK(cudaMallocManaged(&data_, size + 1));
  }
  ~SyncedMemory() { cudaFree(data_); }
  SyncedMemory(const SyncedMemory&) = delete;
  SyncedMemory& operator=(const SyncedMemory&) = delete;

  size_t size() const { return size_; }
  const void* cpu_data() { return mutable_cpu_data(); }
  const void* gpu_data() { return data_; }
  void* mutable_cpu_data() {
    CUDA_CHECK(cudaDeviceSynchronize());
    return data_;
  }
  void* mutable_gpu_data() { return data_; }

 private:
  size_t size_;
  void* data_;
};

template <typename Dtype>
class Blob {
 public:
  explicit Blob(int count)
      : count_(count),
        data_(count * sizeof(Dtype)),
        diff_(count * sizeof(Dtype)) {}
  int count() const { return count_; }
  const Dtype* cpu_data() { return mutable_cpu_data(); }
  const Dtype* gpu_data() { return mutable_gpu_data(); }
  const Dtype* cpu_diff() { return mutable_cpu_diff(); }
  const Dtype* gpu_diff() { return mutable_gpu_diff(); }
  Dtype* mutable_cpu_data() {
    return static_cast<Dtype*>(data_.mutable_cpu_data());
  }
  Dtype* mutable_gpu_data() {
    return static_cast<Dtype*>(data_.mutable_gpu_data());
  }
  Dtype* mutable_cpu_diff() {
    return static_cast<Dtype*>(diff_.mutable_cpu_data());
  }
  Dtype* mutable_gpu_diff() {
    return static_cast<Dtype*>(diff_.mutable_gpu_data());
  }

 private:
  int count_;
  SyncedMemory data_;
  SyncedMemory diff_;
};

// The fields of caffe.proto that the layer reads.
struct ReLUParameter {
  float slope = 0;
  float negative_slope() const { return slope; }
};

struct ThresholdParameter {
  float value = 0;
  float threshold() const { return value; }
};

struct LayerParameter {
  ReLUParameter relu;
  ThresholdParameter thresholds;
  string name() const { return "quantize"; }
  string type() const { return "ActQuantize"; }
  const ReLUParameter& relu_param() const { return relu; }
  const ThresholdParameter& threshold_param() const { return thresholds; }
};

template <typename Dtype>
class NeuronLayer {
 public:
  explicit NeuronLayer(const LayerParameter& param) : layer_param_(param) {}
  virtual ~NeuronLayer() {}
  virtual void LayerSetUp(const vector<Blob<Dtype>*>&,
                          const vector<Blob<Dtype>*>&) = 0;
  virtual void Reshape(const vector<Blob<Dtype>*>&,
                       const vector<Blob<Dtype>*>&) {}
  virtual const char* type() const = 0;

 protected:
  LayerParameter layer_param_;
};

#define INSTANTIATE_CLASS(name) \
  template class name<float>;   \
  template class name<double>
#define INSTANTIATE_LAYER_GPU_FUNCS(name) static_assert(true, "")
#define REGISTER_LAYER_CLASS(type) static_assert(true, "")
#define REGISTER_LAYER_CREATOR(type, creator) static_assert(true, "")

}  // namespace caffe
