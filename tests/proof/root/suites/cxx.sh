# Kvartz's own sources and a program full of templates, compiled with -O2; object files and what the program prints.
set -e
cd /tmp
files="/proof/program.cpp"
for name in base/text base/result base/crc32c base/log base/check base/clock cpu/x86/decode/decoder cpu/x86/decode/features \
  cpu/x86/decode/table base/state_visitor; do
  files="$files /proof/src/$name.cpp"
done
for file in $files; do
  object=$(basename "$file" .cpp).o
  g++ -std=c++23 -O2 -I/proof/src -c "$file" -o "$object"
  echo "$object of $(wc -l < "$file") lines: $(sha256sum < "$object" | cut -c 1-32)"
done
echo "lines after the preprocessor: $(for file in $files; do g++ -std=c++23 -I/proof/src -E -P "$file"; done | wc -l)"
g++ -O2 program.o -o program
echo "program: $(sha256sum < program | cut -c 1-32)"
./program
