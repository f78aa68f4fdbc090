// Compares the layer's CPU and GPU code, value for value and gradient for gradient, on the GPU at hand:
//
//   mkdir -p /tmp/act/caffe/layers && cp caffe_layers/act_quantize.hpp /tmp/act/caffe/layers/
//   nvcc -std=c++17 -I /tmp/act -I tests/caffe/cuda_standin -I caffe_layers tests/caffe/act_quantize_gpu.cu -o /tmp/act/test
//   /tmp/act/test            a few seconds; prints what differs, exits with 1 if anything does
//   /tmp/act/test --large    also a blob of 2^31 - 1 values, the largest that Caffe allows; needs 20 GB of GPU memory
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "act_quantize.cpp"
#include "act_quantize.cu"

namespace {

using caffe::Blob;

enum class Device { kCpu, kGpu };

template <typename Dtype>
class Layer : public caffe::ActQuantizeLayer<Dtype> {
 public:
  using caffe::ActQuantizeLayer<Dtype>::ActQuantizeLayer;

  void Run(Device device, Blob<Dtype>* bottom, Blob<Dtype>* top) {
    const std::vector<Blob<Dtype>*> bottoms(1, bottom);
    const std::vector<Blob<Dtype>*> tops(1, top);
    const std::vector<bool> propagate_down(1, true);
    this->LayerSetUp(bottoms, tops);
    this->Reshape(bottoms, tops);
    if (device == Device::kCpu) {
      this->Forward_cpu(bottoms, tops);
      this->Backward_cpu(tops, propagate_down, bottoms);
    } else {
      this->Forward_gpu(bottoms, tops);
      this->Backward_gpu(tops, propagate_down, bottoms);
    }
  }
};

// Values over the whole range, values around every rounding border, and random bit patterns: subnormals, infinities
// and NaNs among them.
template <typename Dtype>
std::vector<Dtype> Inputs(float step, float levels) {
  const Dtype infinity = std::numeric_limits<Dtype>::infinity();
  std::vector<Dtype> values = {0, Dtype(-0.0), infinity, -infinity, std::numeric_limits<Dtype>::quiet_NaN(),
                               std::numeric_limits<Dtype>::denorm_min()};
  const int most = static_cast<int>(std::abs(levels));
  for (int q = levels < 0 ? -most - 2 : -2; q <= most + 2; ++q) {
    const Dtype border = Dtype(step) * (Dtype(q) + Dtype(0.5));
    for (Dtype x : {border, Dtype(step) * Dtype(q)}) {
      values.insert(values.end(), {x, std::nextafter(x, infinity), std::nextafter(x, -infinity)});
    }
  }
  std::mt19937_64 random(1);
  std::normal_distribution<Dtype> normal(0, Dtype(step) * Dtype(most) / 2);
  for (int i = 0; i < 1000000; ++i) {
    values.push_back(normal(random));
    const uint64_t bits = random();
    Dtype pattern;
    std::memcpy(&pattern, &bits, sizeof pattern);
    values.push_back(pattern);
  }
  return values;
}

template <typename Dtype>
bool Same(Dtype a, Dtype b) {
  return a == b ? std::signbit(a) == std::signbit(b) : std::isnan(a) && std::isnan(b);
}

caffe::LayerParameter Param(float step, float levels) {
  caffe::LayerParameter param;
  param.relu.slope = step;
  param.thresholds.value = levels;
  return param;
}

// Returns how many values and gradients differ.
template <typename Dtype>
int Differences(float step, float levels, bool in_place) {
  const std::vector<Dtype> inputs = Inputs<Dtype>(step, levels);
  const int count = static_cast<int>(inputs.size());
  std::vector<Dtype> outputs[2];
  std::vector<Dtype> gradients[2];
  for (Device device : {Device::kCpu, Device::kGpu}) {
    Blob<Dtype> bottom(count);
    Blob<Dtype> other(count);
    Blob<Dtype>* top = in_place ? &bottom : &other;
    std::copy(inputs.begin(), inputs.end(), bottom.mutable_cpu_data());
    for (int i = 0; i < count; ++i) {
      top->mutable_cpu_diff()[i] = i + 1;
    }
    Layer<Dtype>(Param(step, levels)).Run(device, &bottom, top);
    const int which = static_cast<int>(device);
    outputs[which].assign(top->cpu_data(), top->cpu_data() + count);
    gradients[which].assign(bottom.cpu_diff(), bottom.cpu_diff() + count);
  }
  int differences = 0;
  for (int i = 0; i < count; ++i) {
    if (!Same(outputs[0][i], outputs[1][i]) || !Same(gradients[0][i], gradients[1][i])) {
      if (++differences <= 5) {
        std::printf("  x = %a: cpu %a, gpu %a; gradient cpu %a, gpu %a\n", inputs[i], outputs[0][i], outputs[1][i],
                    gradients[0][i], gradients[1][i]);
      }
    }
  }
  std::printf("%s step %g levels %g%s: %d values, %d differ\n", sizeof(Dtype) == 4 ? "float" : "double", step, levels,
              in_place ? " in place" : "", count, differences);
  return differences;
}

// Returns how many of the values at the ends and in the middle of the largest blob are wrong.
int LargeDifferences() {
  Blob<float> blob(INT_MAX);
  float* data = blob.mutable_cpu_data();
  const size_t places[] = {0, INT_MAX / 2, INT_MAX - 1};
  for (size_t i : places) {
    data[i] = 0.6F;
  }
  Layer<float>(Param(0.25F, 127)).Run(Device::kGpu, &blob, &blob);
  int differences = 0;
  for (size_t i : places) {
    differences += blob.cpu_data()[i] == 0.5F ? 0 : 1;
  }
  std::printf("2^31 - 1 values: %d of 3 wrong\n", differences);
  return differences;
}

}  // namespace

int main(int argc, char** argv) {
  int differences = 0;
  for (float step : {0.0371F, 0.25F, 1e-30F, 3e35F}) {
    for (float levels : {127.0F, 255.0F, 1.0F, -127.0F, -1.0F}) {
      for (bool in_place : {false, true}) {
        differences += Differences<float>(step, levels, in_place);
        differences += Differences<double>(step, levels, in_place);
      }
    }
  }
  if (argc > 1 && std::strcmp(argv[1], "--large") == 0) {
    differences += LargeDifferences();
  }
  return differences == 0 ? 0 : 1;
}
