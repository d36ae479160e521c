# Every digest and cipher that openssl has, over the same data and keys; signatures; a second of each of some speed tests.
cd /tmp || exit 1
key=00112233445566778899aabbccddeeff0f1e2d3c4b5a69788796a5b4c3d2e1f0
openssl enc -aes-128-ctr -K ${key%${key#????????????????????????????????}} -iv 00000000000000000000000000000000 \
  -in /usr/bin/openssl -out data || exit 1
failed=0
for digest in $(openssl list -digest-commands); do
  echo "$digest $(openssl dgst "-$digest" < data 2>> /tmp/details | sed 's/.*= *//')"
done
for cipher in $(openssl enc -list | grep -o -e '-[a-z0-9-]*'); do
  case $cipher in *-wrap* | *-xts | *-ccm | *-gcm | *-ocb) continue ;; esac  # enc does not take them, or not without more
  if openssl enc "$cipher" -pass pass:kvartz -S 0102030405060708 -pbkdf2 -iter 3 -in data -out coded 2> /tmp/details; then
    openssl enc -d "$cipher" -pass pass:kvartz -S 0102030405060708 -pbkdf2 -iter 3 -in coded -out plain 2> /tmp/details
    cmp -s data plain || { failed=1; echo "$cipher does not come back"; }
    echo "$cipher $(sha256sum < coded | cut -c 1-32)"
  else
    echo "$cipher is not there"
  fi
done
echo "rsa $(openssl dgst -sha256 -sign /rsa.pem data | sha256sum | cut -c 1-32)"
for curve in prime256v1 secp384r1 secp521r1; do
  openssl ecparam -genkey -name $curve -out ec.pem && openssl ec -in ec.pem -pubout -out ec.pub 2>> /tmp/details &&
    openssl dgst -sha384 -sign ec.pem -out signature data &&
    echo "$curve $(openssl dgst -sha384 -verify ec.pub -signature signature data)" || failed=1
done
for kind in ed25519 ed448 x25519; do
  openssl genpkey -algorithm $kind -out key.pem && openssl pkey -in key.pem -pubout -out key.pub &&
    echo "$kind $(openssl pkey -pubin -in key.pub -noout -text | wc -l)" || failed=1
done
for speed in "-evp sha256" "-evp sha3-256" "-evp aes-128-gcm" "-evp aes-256-cbc" "-evp chacha20-poly1305" "-evp camellia-128-cbc"; do
  # shellcheck disable=SC2086
  openssl speed -seconds 1 -bytes 8192 $speed > speed 2>> /tmp/details
  echo "speed $speed: status $?"
  tail -n 1 speed >&2
done
for speed in rsa2048 ecdsap256 ecdhx25519 ed25519; do
  openssl speed -seconds 1 $speed > speed 2>> /tmp/details
  echo "speed $speed: status $?"
  tail -n 1 speed >&2
done
exit $failed
