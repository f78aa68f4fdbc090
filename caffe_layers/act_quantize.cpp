#include "caffe/layers/act_quantize.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "caffe/layer_factory.hpp"

namespace caffe {

namespace {
const float kDefaultLevels = 127;
const float kMaxLevels = 255;
const float kMaxSignedLevels = 127;
}  // namespace

template <typename Dtype>
void ActQuantizeLayer<Dtype>::LayerSetUp(const vector<Blob<Dtype>*>& bottom,
                                         const vector<Blob<Dtype>*>& top) {
  const LayerParameter& param = this->layer_param_;
  const float step = param.relu_param().negative_slope();
  CHECK(step > 0 && std::isfinite(step))
      << "ActQuantize layer " << param.name() << ": the step, "
      << "relu_param.negative_slope, must be positive and finite, not " << step;
  const float threshold = param.threshold_param().threshold();
  const float levels = threshold == 0 ? kDefaultLevels : std::abs(threshold);
  const float most = threshold < 0 ? kMaxSignedLevels : kMaxLevels;
  CHECK(levels >= 1 && levels <= most && levels == std::floor(levels))
      << "ActQuantize layer " << param.name() << ": the largest level, "
      << "threshold_param.threshold, must be a whole number from 1 to "
      << kMaxLevels << ", or 0 for " << kDefaultLevels
      << ", or for signed codes from -1 to -" << kMaxSignedLevels << ", not "
      << threshold;
  step_ = step;
  levels_ = levels;
  lowest_ = threshold < 0 ? -levels_ : Dtype(0);
  const Dtype range = step_ * levels_;
  if (threshold < 0) {
    above_ = range + step_ / 2;
    below_ = -above_;
  } else {
    above_ = std::nextafter(range, std::numeric_limits<Dtype>::infinity());
    below_ = 0;
  }
}

template <typename Dtype>
void ActQuantizeLayer<Dtype>::Reshape(const vector<Blob<Dtype>*>& bottom,
                                      const vector<Blob<Dtype>*>& top) {
  NeuronLayer<Dtype>::Reshape(bottom, top);
  const size_t count = bottom[0]->count();
  if (!inside_ || inside_->size() < count) {
    inside_.reset(new SyncedMemory(count));
  }
}

template <typename Dtype>
void ActQuantizeLayer<Dtype>::Forward_cpu(const vector<Blob<Dtype>*>& bottom,
                                          const vector<Blob<Dtype>*>& top) {
  const size_t count = bottom[0]->count();
  const Dtype* bottom_data = bottom[0]->cpu_data();
  Dtype* top_data = top[0]->mutable_cpu_data();
  unsigned char* inside =
      static_cast<unsigned char*>(inside_->mutable_cpu_data());
  for (size_t i = 0; i < count; ++i) {
    const Dtype x = bottom_data[i];
    inside[i] = x > below_ && x < above_ ? 1 : 0;
    // Comparisons in this order keep NaN; the GPU code does the same.
    Dtype q = std::floor(x / step_ + Dtype(0.5));
    q = q < lowest_ ? lowest_ : q;
    q = q > levels_ ? levels_ : q;
    top_data[i] = step_ * q;
  }
}

template <typename Dtype>
void ActQuantizeLayer<Dtype>::Backward_cpu(const vector<Blob<Dtype>*>& top,
                                           const vector<bool>& propagate_down,
                                           const vector<Blob<Dtype>*>& bottom) {
  if (!propagate_down[0]) {
    return;
  }
  const size_t count = bottom[0]->count();
  const Dtype* top_diff = top[0]->cpu_diff();
  Dtype* bottom_diff = bottom[0]->mutable_cpu_diff();
  const unsigned char* inside =
      static_cast<const unsigned char*>(inside_->cpu_data());
  for (size_t i = 0; i < count; ++i) {
    bottom_diff[i] = inside[i] != 0 ? top_diff[i] : Dtype(0);
  }
}

#ifdef CPU_ONLY
STUB_GPU(ActQuantizeLayer);
#endif

INSTANTIATE_CLASS(ActQuantizeLayer);
REGISTER_LAYER_CLASS(ActQuantize);
REGISTER_LAYER_CREATOR(Quant, Creator_ActQuantizeLayer);

}  // namespace caffe
