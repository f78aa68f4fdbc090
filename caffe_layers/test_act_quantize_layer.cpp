#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "caffe/blob.hpp"
#include "caffe/common.hpp"
#include "caffe/filler.hpp"
#include "caffe/layer_factory.hpp"
#include "caffe/layers/act_quantize.hpp"
#include "caffe/test/test_caffe_main.hpp"
#include "caffe/test/test_gradient_check_util.hpp"
#include "gtest/gtest.h"

namespace caffe {

template <typename TypeParam>
class ActQuantizeLayerTest : public MultiDeviceTest<TypeParam> {
  typedef typename TypeParam::Dtype Dtype;

 protected:
  ActQuantizeLayerTest() {
    bottom_vec_.push_back(&bottom_);
    top_vec_.push_back(&top_);
  }

  // A layer with the given step; levels 0 leaves threshold_param out.
  shared_ptr<Layer<Dtype>> MakeLayer(float step, float levels = 0,
                                     const std::string& type = "ActQuantize") {
    LayerParameter param;
    param.set_name("quantize");
    param.set_type(type);
    param.set_phase(TRAIN);
    param.mutable_relu_param()->set_negative_slope(step);
    if (levels != 0) {
      param.mutable_threshold_param()->set_threshold(levels);
    }
    return LayerRegistry<Dtype>::CreateLayer(param);
  }

  void FillBottom(const std::vector<Dtype>& values) {
    bottom_.Reshape(std::vector<int>(1, values.size()));
    std::copy(values.begin(), values.end(), bottom_.mutable_cpu_data());
  }

  void FillBottomAtRandom(Dtype deviation) {
    bottom_.Reshape(2, 3, 40, 50);
    FillerParameter param;
    param.set_std(deviation);
    GaussianFiller<Dtype>(param).Fill(&bottom_);
  }

  // Runs the layer on bottom_ and compares top_, value for value.
  void ExpectForward(Layer<Dtype>* layer, const std::vector<Dtype>& expected) {
    layer->SetUp(bottom_vec_, top_vec_);
    layer->Forward(bottom_vec_, top_vec_);
    ASSERT_EQ(expected.size(), static_cast<size_t>(top_.count()));
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(expected[i], top_.cpu_data()[i])
          << "of " << bottom_.cpu_data()[i];
    }
  }

  // The formula, written on the host; levels below 0: codes of both signs.
  static Dtype Quantized(Dtype x, Dtype step, Dtype levels) {
    const Dtype code = std::floor(x / step + Dtype(0.5));
    const Dtype lowest = std::min(levels, Dtype(0));
    return step * std::min(std::max(code, lowest), std::abs(levels));
  }

  static std::vector<Dtype> Quantized(const Blob<Dtype>& blob, Dtype step,
                                      Dtype levels) {
    std::vector<Dtype> values;
    values.reserve(blob.count());
    for (int i = 0; i < blob.count(); ++i) {
      values.push_back(Quantized(blob.cpu_data()[i], step, levels));
    }
    return values;
  }

  // Runs the layer forwards and backwards and compares the gradient with the
  // one above, which is i + 1, where it should pass, and with 0 elsewhere.
  void ExpectGradients(float step, float levels,
                       const std::vector<Dtype>& values,
                       const std::vector<Dtype>& passes) {
    const std::vector<bool> propagate_down(1, true);
    for (const bool in_place : {false, true}) {
      FillBottom(values);
      std::vector<Blob<Dtype>*>& tops = in_place ? bottom_vec_ : top_vec_;
      shared_ptr<Layer<Dtype>> layer = MakeLayer(step, levels);
      layer->SetUp(bottom_vec_, tops);
      layer->Forward(bottom_vec_, tops);
      for (size_t i = 0; i < values.size(); ++i) {
        tops[0]->mutable_cpu_diff()[i] = i + 1;
      }
      layer->Backward(tops, propagate_down, bottom_vec_);
      for (size_t i = 0; i < values.size(); ++i) {
        EXPECT_EQ(passes[i] * (i + 1), bottom_.cpu_diff()[i])
            << "of " << values[i] << (in_place ? " in place" : "");
      }
    }
  }

  Blob<Dtype> bottom_;
  Blob<Dtype> top_;
  std::vector<Blob<Dtype>*> bottom_vec_;
  std::vector<Blob<Dtype>*> top_vec_;
};

TYPED_TEST_CASE(ActQuantizeLayerTest, TestDtypesAndDevices);

TYPED_TEST(ActQuantizeLayerTest, TestSetUp) {
  typedef typename TypeParam::Dtype Dtype;
  this->bottom_.Reshape(2, 3, 4, 5);
  shared_ptr<Layer<Dtype>> layer = this->MakeLayer(0.1);
  layer->SetUp(this->bottom_vec_, this->top_vec_);
  EXPECT_STREQ("ActQuantize", layer->type());
  EXPECT_EQ(this->bottom_.shape(), this->top_.shape());
}

TYPED_TEST(ActQuantizeLayerTest, TestForward) {
  const float step = 0.0371F;
  this->FillBottomAtRandom(2);
  this->ExpectForward(this->MakeLayer(step).get(),
                      this->Quantized(this->bottom_, step, 127));
}

TYPED_TEST(ActQuantizeLayerTest, TestForwardFullByte) {
  const float step = 0.0371F;
  this->FillBottomAtRandom(4);
  this->ExpectForward(this->MakeLayer(step, 255).get(),
                      this->Quantized(this->bottom_, step, 255));
}

TYPED_TEST(ActQuantizeLayerTest, TestForwardSigned) {
  const float step = 0.0371F;
  this->FillBottomAtRandom(4);
  this->ExpectForward(this->MakeLayer(step, -127).get(),
                      this->Quantized(this->bottom_, step, -127));
  this->ExpectForward(this->MakeLayer(step, -7).get(),
                      this->Quantized(this->bottom_, step, -7));
}

TYPED_TEST(ActQuantizeLayerTest, TestOldTypeName) {
  typedef typename TypeParam::Dtype Dtype;
  this->FillBottomAtRandom(2);
  shared_ptr<Layer<Dtype>> layer = this->MakeLayer(0.5, 0, "Quant");
  EXPECT_STREQ("Quant", layer->type());
  this->ExpectForward(layer.get(), this->Quantized(this->bottom_, 0.5, 127));
}

TYPED_TEST(ActQuantizeLayerTest, TestTiesGoUp) {
  this->FillBottom({0.125, 0.375, 0.625, 0.124, 0.126, 31.625});
  this->ExpectForward(this->MakeLayer(0.25).get(),
                      {0.25, 0.5, 0.75, 0, 0.25, 31.75});
}

TYPED_TEST(ActQuantizeLayerTest, TestTiesGoUpSigned) {
  this->FillBottom({-0.125, -0.126, -0.375, -0.376, 0.125, -31.625, -31.626});
  this->ExpectForward(this->MakeLayer(0.25, -127).get(),
                      {0, -0.25, -0.25, -0.5, 0.25, -31.5, -31.75});
}

TYPED_TEST(ActQuantizeLayerTest, TestSaturation) {
  typedef typename TypeParam::Dtype Dtype;
  const Dtype infinity = std::numeric_limits<Dtype>::infinity();
  this->FillBottom({31.75, 31.874, 31.875, 32, 1e30, infinity});
  this->ExpectForward(this->MakeLayer(0.25).get(),
                      std::vector<Dtype>(6, 31.75));
  this->ExpectForward(this->MakeLayer(0.25, 1).get(),
                      std::vector<Dtype>(6, 0.25));
}

TYPED_TEST(ActQuantizeLayerTest, TestNegativeInput) {
  typedef typename TypeParam::Dtype Dtype;
  const Dtype infinity = std::numeric_limits<Dtype>::infinity();
  this->FillBottom({0, -0.0, -0.1, -0.125, -0.126, -1, -1e30, -infinity});
  this->ExpectForward(this->MakeLayer(0.25).get(), std::vector<Dtype>(8, 0));
}

TYPED_TEST(ActQuantizeLayerTest, TestSaturationSigned) {
  typedef typename TypeParam::Dtype Dtype;
  const Dtype infinity = std::numeric_limits<Dtype>::infinity();
  this->FillBottom({-31.75, -31.875, -32, -1e30, -infinity, 32, infinity});
  this->ExpectForward(this->MakeLayer(0.25, -127).get(),
                      {-31.75, -31.75, -31.75, -31.75, -31.75, 31.75, 31.75});
}

TYPED_TEST(ActQuantizeLayerTest, TestNanStaysNan) {
  typedef typename TypeParam::Dtype Dtype;
  for (const float levels : {127.0F, -127.0F}) {
    this->FillBottom({std::numeric_limits<Dtype>::quiet_NaN()});
    shared_ptr<Layer<Dtype>> layer = this->MakeLayer(0.25, levels);
    layer->SetUp(this->bottom_vec_, this->top_vec_);
    layer->Forward(this->bottom_vec_, this->top_vec_);
    EXPECT_TRUE(std::isnan(this->top_.cpu_data()[0]));
  }
}

TYPED_TEST(ActQuantizeLayerTest, TestInPlace) {
  typedef typename TypeParam::Dtype Dtype;
  this->FillBottomAtRandom(2);
  const std::vector<Dtype> expected = this->Quantized(this->bottom_, 0.5, 127);
  shared_ptr<Layer<Dtype>> layer = this->MakeLayer(0.5);
  layer->SetUp(this->bottom_vec_, this->bottom_vec_);
  layer->Forward(this->bottom_vec_, this->bottom_vec_);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(expected[i], this->bottom_.cpu_data()[i]);
  }
}

TYPED_TEST(ActQuantizeLayerTest, TestReshape) {
  typedef typename TypeParam::Dtype Dtype;
  shared_ptr<Layer<Dtype>> layer = this->MakeLayer(0.5);
  this->FillBottom({0.6});
  layer->SetUp(this->bottom_vec_, this->top_vec_);
  layer->Forward(this->bottom_vec_, this->top_vec_);
  this->FillBottomAtRandom(2);
  layer->Forward(this->bottom_vec_, this->top_vec_);
  const std::vector<Dtype> expected = this->Quantized(this->bottom_, 0.5, 127);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(expected[i], this->top_.cpu_data()[i]);
  }
}

// The gradient passes for 0 < x <= step * levels, not in place and in place.
TYPED_TEST(ActQuantizeLayerTest, TestGradientRange) {
  this->ExpectGradients(0.25, 0, {-1, -0.1, 0, 0.01, 5, 31.75, 31.76, 99},
                        {0, 0, 0, 1, 1, 1, 0, 0});
}

// Of signed codes, for |x| < step * (levels + 0.5).
TYPED_TEST(ActQuantizeLayerTest, TestGradientRangeSigned) {
  this->ExpectGradients(0.25, -127,
                        {-99, -31.875, -31.874, -0.1, 0, 5, 31.874, 31.875, 99},
                        {0, 0, 1, 1, 1, 1, 1, 0, 0});
}

// Differences over whole steps see the straight-through slope exactly: 1
// inside the range, 0 outside.
TYPED_TEST(ActQuantizeLayerTest, TestGradient) {
  typedef typename TypeParam::Dtype Dtype;
  this->FillBottom({-50, -9, -2.1, 1.3, 2, 15.6, 30.7, 33.1, 50});
  GradientChecker<Dtype> checker(1, 1e-3);
  checker.CheckGradientEltwise(this->MakeLayer(0.25).get(), this->bottom_vec_,
                               this->top_vec_);
  checker.CheckGradientEltwise(this->MakeLayer(0.25, -127).get(),
                               this->bottom_vec_, this->top_vec_);
}

}  // namespace caffe
