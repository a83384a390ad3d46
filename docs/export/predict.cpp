// Runs the compiled program of an export on tensors that Python has saved: see docs/export.md.
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: " << arguments[0] << " serving/compiled.pt2 inputs.pt\n";
    return 2;
  }
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader program(arguments[1]);

  // A list of tensors: the inputs of the program, in the order of serving.json, then its weights, in that of their names.
  std::ifstream file(arguments[2], std::ios::binary);
  const std::vector<char> content{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue saved = torch::jit::pickle_load(content);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& each : saved.toListRef()) {
    tensors.push_back(each.toTensor());
  }

  // The first output has a row per user (retrieval: the vector) or candidate (ranking: the logits).
  // The others are the keys and values of each layer, for requests to come.
  const at::Tensor found = program.run(tensors).front();
  std::cout << std::setprecision(9);
  for (int64_t row = 0; row < found.size(0); ++row) {
    for (int64_t column = 0; column < found.size(1); ++column) {
      std::cout << (column ? " " : "") << found[row][column].item<float>();
    }
    std::cout << "\n";
  }
}
