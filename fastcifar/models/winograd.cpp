// The transforms of Winograd's algorithm F(4x4, 3x3); see winograd.py. Arrays are float32, and images are [n, H, W, C]
// in memory. An image has th x tw tiles; a call transforms `count` tiles, from tile `first` of all images on. Tile (i, j)
// of a source begins at row 4 i - padding and column 4 j - padding, where rows and columns outside of the image are zero.
// An array of transformed tiles is [36, count, C].
#include <cstdint>

using Vector = float __attribute__((vector_size(32), aligned(4)));
constexpr int64_t LANES = sizeof(Vector) / sizeof(float);  // C is a multiple of it

struct Image {
  int64_t height, width, channels;
};

struct Tiles {
  int64_t th, tw, first, count;
};

// The matrices B^T, A and A^T of the algorithm times the column of vectors at `x`, with strides of `s` and `r` vectors.

static inline void multiply_input(const Vector* x, int s, Vector* result, int r) {
  const Vector x1 = x[s], x2 = x[2 * s], x3 = x[3 * s], x4 = x[4 * s];
  const Vector even = x4 - 4.f * x2, odd = x3 - 4.f * x1, far_even = x4 - x2, far_odd = 2.f * (x3 - x1);
  result[0] = 4.f * x[0] - 5.f * x2 + x4;
  result[r] = even + odd;
  result[2 * r] = even - odd;
  result[3 * r] = far_even + far_odd;
  result[4 * r] = far_even - far_odd;
  result[5 * r] = 4.f * x1 - 5.f * x3 + x[5 * s];
}

static inline void multiply_gradient(const Vector* x, int s, Vector* result, int r) {
  const Vector x0 = x[0], x1 = x[s], x2 = x[2 * s], x3 = x[3 * s];
  const Vector even = x0 + x2, odd = x1 + x3, far_even = x0 + 4.f * x2, far_odd = 2.f * x1 + 8.f * x3;
  result[0] = x0;
  result[r] = even + odd;
  result[2 * r] = even - odd;
  result[3 * r] = far_even + far_odd;
  result[4 * r] = far_even - far_odd;
  result[5 * r] = x3;
}

static inline void multiply_output(const Vector* x, int s, Vector* result, int r) {
  const Vector sum = x[s] + x[2 * s], difference = x[s] - x[2 * s];
  const Vector far_sum = x[3 * s] + x[4 * s], far_difference = x[3 * s] - x[4 * s];
  result[0] = x[0] + sum + far_sum;
  result[r] = difference + 2.f * far_difference;
  result[2 * r] = sum + 4.f * far_sum;
  result[3 * r] = difference + 8.f * far_difference + x[5 * s];
}

// Transform tiles of SIZE x SIZE pixels to 6 x 6 values.
template <int SIZE, void (*MULTIPLY)(const Vector*, int, Vector*, int)>
static void transform(const float* images, Image image, int64_t padding, Tiles tiles, float* result, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tiles.count; t++) {
    const int64_t tile = tiles.first + t;
    const int64_t row = tile / tiles.tw % tiles.th * 4 - padding, column = tile % tiles.tw * 4 - padding;
    const float* source = images + tile / (tiles.th * tiles.tw) * image.height * image.width * image.channels;
    for (int64_t c = 0; c < image.channels; c += LANES) {
      Vector pixels[SIZE * SIZE], half[6 * SIZE], values[36];
      for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++) {
          const int64_t y = row + i, x = column + j;
          const bool inside = y >= 0 && y < image.height && x >= 0 && x < image.width;
          pixels[i * SIZE + j] = inside ? *(const Vector*)(source + (y * image.width + x) * image.channels + c) : Vector{};
        }
      for (int j = 0; j < SIZE; j++) MULTIPLY(pixels + j, SIZE, half + j, SIZE);
      for (int i = 0; i < 6; i++) MULTIPLY(half + i * SIZE, 1, values + i * 6, 1);
      for (int k = 0; k < 36; k++) *(Vector*)(result + (k * tiles.count + t) * image.channels + c) = values[k];
    }
  }
}

extern "C" void transform_input(
    const float* images, Image image, int64_t padding, Tiles tiles, float* result, int threads) {
  transform<6, multiply_input>(images, image, padding, tiles, result, threads);
}

extern "C" void transform_gradient(const float* images, Image image, Tiles tiles, float* result, int threads) {
  transform<4, multiply_gradient>(images, image, 0, tiles, result, threads);
}

// Transform 6 x 6 values to tiles of 4 x 4 pixels, and write those within the images.
extern "C" void transform_output(const float* values, Image image, Tiles tiles, float* images, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tiles.count; t++) {
    const int64_t tile = tiles.first + t;
    const int64_t row = tile / tiles.tw % tiles.th * 4, column = tile % tiles.tw * 4;
    float* target = images + tile / (tiles.th * tiles.tw) * image.height * image.width * image.channels;
    for (int64_t c = 0; c < image.channels; c += LANES) {
      Vector products[36], half[24], pixels[16];
      for (int k = 0; k < 36; k++) products[k] = *(const Vector*)(values + (k * tiles.count + t) * image.channels + c);
      for (int j = 0; j < 6; j++) multiply_output(products + j, 6, half + j, 6);
      for (int i = 0; i < 4; i++) multiply_output(half + i * 6, 1, pixels + i * 4, 1);
      for (int i = 0; i < 4 && row + i < image.height; i++)
        for (int j = 0; j < 4 && column + j < image.width; j++)
          *(Vector*)(target + ((row + i) * image.width + column + j) * image.channels + c) = pixels[i * 4 + j];
    }
  }
}
