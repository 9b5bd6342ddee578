// Reads cubins. The section .nv.info lists attributes of kernels; its format is documented by tools such as cuobjdump,
// whose option --dump-resource-usage prints the same numbers.
#include "cubin.h"

#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// An attribute: one byte for the format of its value, one for its kind, and two for a value or the size of one.
constexpr uint8_t kSizedValue = 4;
constexpr uint8_t kFrameSize = 0x11, kRegisterCount = 0x2f;  // the value is (index of the symbol, number)

static std::vector<Elf64_Shdr> read_sections(const char* image) {
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  std::memcpy(sections.data(), image + header.e_shoff, sections.size() * sizeof sections[0]);
  return sections;
}

std::string stub::copy_cubin(const void* image) {
  auto bytes = static_cast<const char*>(image);
  Elf64_Ehdr header;
  std::memcpy(&header, bytes, sizeof header);
  size_t size = std::max(header.e_shoff + header.e_shnum * sizeof(Elf64_Shdr),
                         header.e_phoff + header.e_phnum * sizeof(Elf64_Phdr));
  for (const Elf64_Shdr& section : read_sections(bytes))
    if (section.sh_type != SHT_NOBITS) size = std::max(size, section.sh_offset + section.sh_size);
  return {bytes, size};
}

bool stub::find_kernel(const std::string& cubin, const std::string& name, Resources& resources) {
  const char* image = cubin.data();
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  std::vector<Elf64_Shdr> sections = read_sections(image);
  const char* section_names = image + sections[header.e_shstrndx].sh_offset;
  auto find_section = [&](const std::string& wanted) -> const Elf64_Shdr* {
    for (const Elf64_Shdr& section : sections)
      if (section_names + section.sh_name == wanted) return &section;
    return nullptr;
  };
  if (!find_section(".text." + name)) return false;
  if (auto shared = find_section(".nv.shared." + name)) resources.shared_bytes = shared->sh_size;
  auto symbols = find_section(".symtab"), attributes = find_section(".nv.info");
  if (!symbols || !attributes) return true;
  auto symbol_table = reinterpret_cast<const Elf64_Sym*>(image + symbols->sh_offset);
  const char* symbol_names = image + sections[symbols->sh_link].sh_offset;
  const char* position = image + attributes->sh_offset;
  const char* end = position + attributes->sh_size;
  while (position < end) {
    uint8_t format = position[0], kind = position[1];
    uint16_t size;
    std::memcpy(&size, position + 2, sizeof size);
    if (format == kSizedValue && (kind == kFrameSize || kind == kRegisterCount)) {
      uint32_t value[2];
      std::memcpy(value, position + 4, sizeof value);
      if (symbol_names + symbol_table[value[0]].st_name == name)
        (kind == kFrameSize ? resources.local_bytes : resources.registers) = value[1];
    }
    position += 4 + (format == kSizedValue ? size : 0);
  }
  return true;
}
