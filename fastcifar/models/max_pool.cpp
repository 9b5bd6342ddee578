// 2x2 max pooling; see max_pool.py. Arrays are [n, H, W, C] in memory, of even H and W. `rows` is the number of rows in
// the output of all images, and `width` is its width. Pixel (i, j) of a 2x2 window has the offset 2 i + j.
#include <cstdint>
#include <cstring>

struct BFloat16 {
  uint16_t bits;

  explicit BFloat16(float x) {  // `x` must be a bfloat16
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    bits = word >> 16;
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
  }
};

template <class T>
static void max_pool(
    const T* images, int64_t rows, int64_t width, int64_t channels, T* values, int8_t* offsets, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t column = 0; column < width; column++) {
      const T *top = images + (row * 2 * width + column) * 2 * channels, *bottom = top + 2 * width * channels;
      T* value = values + (row * width + column) * channels;
      int8_t* offset = offsets + (row * width + column) * channels;
      for (int64_t c = 0; c < channels; c++) {
        const float pixels[] = {top[c], top[channels + c], bottom[c], bottom[channels + c]};
        float largest = pixels[0];
        int32_t index = 0;
        for (int32_t k = 1; k < 4; k++) {
          const bool is_chosen = pixels[k] > largest || pixels[k] != pixels[k];  // the last NaN, as in PyTorch
          largest = is_chosen ? pixels[k] : largest;
          index = is_chosen ? k : index;
        }
        value[c] = T(largest);
        offset[c] = index;
      }
    }
}

template <class T>
static void max_pool_backward(
    const T* grads, const int8_t* offsets, int64_t rows, int64_t width, int64_t channels, T* result, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t column = 0; column < width; column++) {
      const T* grad = grads + (row * width + column) * channels;
      const int8_t* offset = offsets + (row * width + column) * channels;
      T* pixel = result + (row * 2 * width + column) * 2 * channels;
      for (int8_t k = 0; k < 4; k++) {
        T* target = pixel + k / 2 * 2 * width * channels + k % 2 * channels;
        for (int64_t c = 0; c < channels; c++) target[c] = grad[c] & -T(offset[c] == k);
      }
    }
}

#define FUNCTIONS(NAME, T, BITS)                                                                                 \
  extern "C" void max_pool_##NAME(                                                                               \
      const T* images, int64_t rows, int64_t width, int64_t channels, T* values, int8_t* offsets, int threads) { \
    max_pool(images, rows, width, channels, values, offsets, threads);                                           \
  }                                                                                                              \
  extern "C" void max_pool_backward_##NAME(                                                                      \
      const BITS* grads, const int8_t* offsets, int64_t rows, int64_t width, int64_t channels, BITS* result,     \
      int threads) {                                                                                             \
    max_pool_backward(grads, offsets, rows, width, channels, result, threads);                                   \
  }

FUNCTIONS(float32, float, uint32_t)
FUNCTIONS(bfloat16, BFloat16, uint16_t)
