// norm_act on a CPU: ./program FOLDER THREADS BLOCKS runs the kernel of csrc/normalization.cuh in blocks of THREADS, at most
// BLOCKS of them. FOLDER/arguments holds a line "name number" for each of NormActArgs' fields; for an address the number is
// its size in bytes (-1: null) and FOLDER/<name> what stands there. y and cache_out are written back.
#define SF_SIMT
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <fstream>
#include <map>
#include <string>
#include <type_traits>

#include "normalization.cuh"

int main(int, char** words) {
  const std::string folder = std::string(words[1]) + "/";
  std::map<std::string, double> given;
  std::ifstream arguments(folder + "arguments");
  for (auto [name, number] = std::pair<std::string, double>(); arguments >> name >> number;) given[name] = number;

  sf::NormActArgs args{};
  std::map<std::string, std::pair<void*, size_t>> memory;
  sf::NormActArgs::fields([&](const std::string& name, auto member) {
    using T = std::remove_reference_t<decltype(args.*member)>;
    if constexpr (!std::is_pointer_v<T>) {
      args.*member = T(given.at(name));
    } else if (given.at(name) >= 0) {
      const auto bytes = size_t(given.at(name));
      void* const block = std::malloc(bytes);  // aligned to 16 bytes, and just as large
      std::ifstream(folder + name, std::ios::binary).read(static_cast<char*>(block), bytes);
      memory[name] = {block, bytes};
      args.*member = static_cast<T>(block);
    }
  });
  sf::norm_act_launch(args, std::atoi(words[2]), std::atoi(words[3]), nullptr);
  for (const auto& [name, block] : memory) {
    if (name == "y" || name == "cache_out")
      std::ofstream(folder + name, std::ios::binary).write(static_cast<const char*>(block.first), block.second);
    std::free(block.first);
  }
  return 0;
}
