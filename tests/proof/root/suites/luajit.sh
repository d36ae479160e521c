# LuaJIT, with its compiler and without: both print the same.
set -e
cd /tmp
luajit -jon /proof/program.lua > on
luajit -joff /proof/program.lua > off
cmp on off
cat on
