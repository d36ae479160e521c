# node, whose compilers write code while it runs: numbers, strings, collections, WebAssembly, several threads.
exec timeout 600 node /proof/program.js
