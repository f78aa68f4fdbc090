#ifndef CAFFE_ACT_QUANTIZE_LAYER_HPP_
#define CAFFE_ACT_QUANTIZE_LAYER_HPP_

#include <vector>

#include "caffe/blob.hpp"
#include "caffe/layer.hpp"
#include "caffe/layers/neuron_layer.hpp"
#include "caffe/proto/caffe.pb.h"
#include "caffe/syncedmem.hpp"

namespace caffe {

/**
 * @brief Rounds to equidistant values and dequantizes, on CPU and GPU alike:
 *        @f$ y = a \min(\max(\lfloor x / a + 0.5 \rfloor, lowest), levels) @f$.
 *        Unsigned codes (lowest = 0) make it a ReLU as well; signed ones
 *        (lowest = -levels) serve any other blob.
 *
 * The gradient is straight-through: it passes unchanged inside the range and is
 * 0 elsewhere. Inside is @f$ 0 < x \le a \cdot levels @f$ for unsigned codes
 * and
 * @f$ |x| < a (levels + 0.5) @f$ for signed ones. One byte per value says
 * which, so that working in place (bottom and top the same blob) gives the same
 * gradient. NaN stays NaN and passes no gradient.
 *
 * The parameters travel in fields that every caffe.proto has:
 *   - relu_param.negative_slope: the step a, positive and finite.
 *   - threshold_param.threshold: levels, an integer from 1 to 255; absent or 0
 *     means 127. From -1 to -127: signed codes from there to levels, its
 *     absolute value.
 *
 * Bottom and top: one blob of any shape. Type names: ActQuantize, and Quant for
 * old prototxts.
 */
template <typename Dtype>
class ActQuantizeLayer : public NeuronLayer<Dtype> {
 public:
  explicit ActQuantizeLayer(const LayerParameter& param)
      : NeuronLayer<Dtype>(param),
        step_(0),
        lowest_(0),
        levels_(0),
        below_(0),
        above_(0) {}
  virtual void LayerSetUp(const vector<Blob<Dtype>*>& bottom,
                          const vector<Blob<Dtype>*>& top);
  virtual void Reshape(const vector<Blob<Dtype>*>& bottom,
                       const vector<Blob<Dtype>*>& top);

  /// The name it was created by: LayerFactoryTest of Caffe wants that.
  virtual inline const char* type() const {
    return this->layer_param_.type() == "Quant" ? "Quant" : "ActQuantize";
  }

 protected:
  virtual void Forward_cpu(const vector<Blob<Dtype>*>& bottom,
                           const vector<Blob<Dtype>*>& top);
  virtual void Forward_gpu(const vector<Blob<Dtype>*>& bottom,
                           const vector<Blob<Dtype>*>& top);
  virtual void Backward_cpu(const vector<Blob<Dtype>*>& top,
                            const vector<bool>& propagate_down,
                            const vector<Blob<Dtype>*>& bottom);
  virtual void Backward_gpu(const vector<Blob<Dtype>*>& top,
                            const vector<bool>& propagate_down,
                            const vector<Blob<Dtype>*>& bottom);

 private:
  Dtype step_;
  Dtype lowest_;
  Dtype levels_;
  /// The gradient passes where below_ < bottom < above_.
  Dtype below_;
  Dtype above_;
  /// One unsigned char per value: 1 where the last bottom was inside the range.
  shared_ptr<SyncedMemory> inside_;
};

}  // namespace caffe

#endif  // CAFFE_ACT_QUANTIZE_LAYER_HPP_
