#include "caffe/layer.hpp"
