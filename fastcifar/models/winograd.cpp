// The transforms of Winograd's algorithm F(M x M, 3 x 3), M = 2 to 6; see winograd.py. Arrays are float32, and images
// are [n, H, W, C] in memory. An image has th x tw tiles; a call transforms `count` tiles, from tile `first` of a batch
// on. Tile (i, j) of a source begins at row M i - padding and column M j - padding, where rows and columns outside of
// the image are zero. An array of transformed tiles is [(M + 2) * (M + 2), count, C].
#include <cstdint>

using Vector = float __attribute__((vector_size(32), aligned(4)));
constexpr int64_t LANES = sizeof(Vector) / sizeof(float);  // C is a multiple of it

struct Image {
  int64_t height, width, channels;
};

struct Tiles {
  int64_t size, th, tw, first, count;  // `size` is M
};

// The algorithm evaluates polynomials at the first M + 1 of these points, and at infinity; as in winograd.py.
constexpr float POINTS[] = {0, 1, -1, 2, -2, .5f, -.5f};

// Of the tiles of the input: row i has the coefficients of the product of (x - p) over all points p except the i-th,
// and the last row those of the product over all points (the matrix B^T of Lavin and Gray).
template <int M>
struct Input {
  static constexpr int ROWS = M + 2, COLUMNS = M + 2, PAIRED = M % 2 ? 0 : M;  // of an odd number of points, or none
  float values[ROWS][COLUMNS] = {};
  constexpr Input() {
    for (int i = 0; i < ROWS; i++) {
      values[i][0] = 1;
      for (int k = 0, degree = 0; k < ROWS - 1; k++) {
        if (k == i) continue;
        degree++;
        for (int j = degree; j >= 0; j--) values[i][j] = (j ? values[i][j - 1] : 0) - POINTS[k] * values[i][j];
      }
    }
  }
};

// Of the tiles of the output's gradient, and transposed of those of the output: row i has the powers of the i-th point,
// and the last row a one at the end (the matrix A).
template <int M>
struct Powers {
  static constexpr int ROWS = M + 2, COLUMNS = M, PAIRED = M / 2 * 2;
  float values[ROWS][COLUMNS] = {};
  constexpr Powers() {
    for (int i = 0; i < ROWS - 1; i++) {
      values[i][0] = 1;
      for (int j = 1; j < COLUMNS; j++) values[i][j] = POINTS[i] * values[i][j - 1];
    }
    values[ROWS - 1][COLUMNS - 1] = 1;
  }
};

// Rows 1 and 2, 3 and 4, ... of points p and -p differ only in the sign of some elements. With the sum of the products
// of these and that of the others, both rows take as many multiplications as one.
template <class Matrix>
static constexpr bool is_first_of_pair(int i) {
  return i % 2 == 1 && i < Matrix::PAIRED;
}

template <class Matrix>
static constexpr bool is_second_of_pair(int i) {
  return i > 0 && is_first_of_pair<Matrix>(i - 1);
}

// The product of a constant matrix and the column of vectors at `x`, with strides of `s` and `r` vectors.
template <class Matrix>
static inline void multiply_rows(const Vector* x, int s, Vector* result, int r) {
  static constexpr Matrix matrix;
#pragma GCC unroll 8
  for (int i = 0; i < Matrix::ROWS; i++) {
    if (is_second_of_pair<Matrix>(i)) continue;
    const bool is_pair = is_first_of_pair<Matrix>(i);
    Vector sum{}, opposite{};
#pragma GCC unroll 8
    for (int j = 0; j < Matrix::COLUMNS; j++) {
      const float value = matrix.values[i][j];
      if (value == 0) continue;
      (is_pair && matrix.values[i + 1][j] == -value ? opposite : sum) += value * x[j * s];
    }
    result[i * r] = sum + opposite;
    if (is_pair) result[(i + 1) * r] = sum - opposite;
  }
}

// The product of the transposed matrix and the column at `x`.
template <class Matrix>
static inline void multiply_columns(const Vector* x, int s, Vector* result, int r) {
  static constexpr Matrix matrix;
  Vector terms[Matrix::ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < Matrix::ROWS; i++) {
    const bool is_pair = is_first_of_pair<Matrix>(i);
    terms[i] = is_second_of_pair<Matrix>(i) ? x[(i - 1) * s] - x[i * s] : x[i * s];
    if (is_pair) terms[i] += x[(i + 1) * s];
  }
#pragma GCC unroll 8
  for (int j = 0; j < Matrix::COLUMNS; j++) {
    Vector sum{};
#pragma GCC unroll 8
    for (int i = 0; i < Matrix::ROWS; i++) {
      const bool is_pair = is_first_of_pair<Matrix>(i);
      const float value = matrix.values[i][j];
      if (value == 0 || is_second_of_pair<Matrix>(i)) continue;
      sum += value * terms[is_pair && matrix.values[i + 1][j] == -value ? i + 1 : i];
    }
    result[j * r] = sum;
  }
}

// Transform tiles of SIZE x SIZE pixels by a matrix with SIZE columns.
template <class Matrix>
static void transform(const float* images, Image image, int64_t padding, Tiles tiles, float* result, int threads) {
  constexpr int SIZE = Matrix::COLUMNS, N = Matrix::ROWS, M = N - 2;
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tiles.count; t++) {
    const int64_t tile = tiles.first + t;
    const int64_t row = tile / tiles.tw % tiles.th * M - padding, column = tile % tiles.tw * M - padding;
    const float* source = images + tile / (tiles.th * tiles.tw) * image.height * image.width * image.channels;
    for (int64_t c = 0; c < image.channels; c += LANES) {
      Vector pixels[SIZE * SIZE], half[N * SIZE], values[N * N];
      for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++) {
          const int64_t y = row + i, x = column + j;
          const bool inside = y >= 0 && y < image.height && x >= 0 && x < image.width;
          const float* pixel = source + (y * image.width + x) * image.channels + c;
          pixels[i * SIZE + j] = inside ? *(const Vector*)pixel : Vector{};
        }
      for (int j = 0; j < SIZE; j++) multiply_rows<Matrix>(pixels + j, SIZE, half + j, SIZE);
      for (int i = 0; i < N; i++) multiply_rows<Matrix>(half + i * SIZE, 1, values + i * N, 1);
      for (int k = 0; k < N * N; k++) *(Vector*)(result + (k * tiles.count + t) * image.channels + c) = values[k];
    }
  }
}

// Transform (M + 2) x (M + 2) values to tiles of M x M pixels, and write those within the images.
template <int M>
static void write_output(const float* values, Image image, Tiles tiles, float* images, int threads) {
  constexpr int N = M + 2;
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tiles.count; t++) {
    const int64_t tile = tiles.first + t;
    const int64_t row = tile / tiles.tw % tiles.th * M, column = tile % tiles.tw * M;
    float* target = images + tile / (tiles.th * tiles.tw) * image.height * image.width * image.channels;
    for (int64_t c = 0; c < image.channels; c += LANES) {
      Vector products[N * N], half[M * N], pixels[M * M];
      for (int k = 0; k < N * N; k++)
        products[k] = *(const Vector*)(values + (k * tiles.count + t) * image.channels + c);
      for (int j = 0; j < N; j++) multiply_columns<Powers<M>>(products + j, N, half + j, N);
      for (int i = 0; i < M; i++) multiply_columns<Powers<M>>(half + i * N, 1, pixels + i * M, 1);
      for (int i = 0; i < M && row + i < image.height; i++)
        for (int j = 0; j < M && column + j < image.width; j++)
          *(Vector*)(target + ((row + i) * image.width + column + j) * image.channels + c) = pixels[i * M + j];
    }
  }
}

extern "C" void transform_input(
    const float* images, Image image, int64_t padding, Tiles tiles, float* result, int threads) {
  static constexpr decltype(&transform<Input<2>>) functions[] = {
      transform<Input<2>>, transform<Input<3>>, transform<Input<4>>, transform<Input<5>>, transform<Input<6>>};
  functions[tiles.size - 2](images, image, padding, tiles, result, threads);
}

extern "C" void transform_gradient(const float* images, Image image, Tiles tiles, float* result, int threads) {
  static constexpr decltype(&transform<Powers<2>>) functions[] = {
      transform<Powers<2>>, transform<Powers<3>>, transform<Powers<4>>, transform<Powers<5>>, transform<Powers<6>>};
  functions[tiles.size - 2](images, image, 0, tiles, result, threads);
}

extern "C" void transform_output(const float* values, Image image, Tiles tiles, float* images, int threads) {
  static constexpr decltype(&write_output<2>) functions[] = {
      write_output<2>, write_output<3>, write_output<4>, write_output<5>, write_output<6>};
  functions[tiles.size - 2](values, image, tiles, images, threads);
}
