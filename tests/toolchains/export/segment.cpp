// A host without Python: segment PROGRAM.ts VOLUME.f32 H W D MASK.u8
// VOLUME.f32 holds H x W x D float32 in C order (LPS, slices along the last axis), MASK.u8 gets as many bytes of 0 and 1.
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <string>

int main(int argc, char** argv) {
  if (argc < 7) {
    std::cerr << "usage: segment PROGRAM.ts VOLUME.f32 H W D MASK.u8\n";
    return 2;
  }
  try {
    torch::jit::ExtraFilesMap extra{{"metadata.json", ""}};
    auto program = torch::jit::load(argv[1], torch::kCPU, extra);
    std::cout << extra["metadata.json"].substr(0, 200) << "...\n";

    auto volume = torch::empty({1, std::stol(argv[3]), std::stol(argv[4]), std::stol(argv[5])});
    std::ifstream in(argv[2], std::ios::binary);
    if (!in.read(reinterpret_cast<char*>(volume.data_ptr<float>()), volume.nbytes()))
      throw std::runtime_error("the volume's file is shorter than its shape says");

    auto mask = program.forward({volume}).toTuple()->elements()[0].toTensor().contiguous();
    std::cout << "mask " << mask.sizes() << ", " << mask.sum().item<int64_t>() << " voxels\n";
    std::ofstream(argv[6], std::ios::binary).write(reinterpret_cast<char*>(mask.data_ptr<uint8_t>()), mask.nbytes());
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
