#!/bin/dash
# Real programs that choose their code by CPUID, and whose results are the same on every CPU that is right. Each line between
# BEGIN and END is a result. The same file runs on this machine's CPU and in the guest; `long` as first argument asks for more.
export PATH=/usr/bin:/usr/sbin LC_ALL=C TZ=UTC HOME=/tmp
cd /tmp || exit 1
long=$1

# NAME COMMAND…: status and hash of what it writes.
result() {
    name=$1
    shift
    "$@" >out 2>err </dev/null
    echo "$name: $? $(sha256sum <out | cut -c1-16)"
}
# The first N bytes of a stream that nobody compresses.
noise() {
    head -c "$1" /dev/zero | openssl enc -aes-128-ctr -K 00112233445566778899aabbccddeeff -iv 00000000000000000000000000000000
}
megabytes() { [ "$long" ] && echo "$2"000000 || echo "$1"000000; }

echo BEGIN
noise "$(megabytes 1 8)" >data
echo "data: $(sha256sum <data)"

# Hashes, ciphers, authenticators: SHA, AES, VAES, PCLMULQDQ, AVX2.
for digest in md5 sha1 sha224 sha256 sha384 sha512 sha3-256 sha3-512 shake256 blake2b512 blake2s256 sm3; do
    result "digest $digest" openssl dgst -$digest -r data
done
key=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f
iv=f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff
for cipher in aes-256-cbc aes-256-ctr aes-256-ecb aes-256-cfb aes-256-ofb camellia-256-cbc aria-256-ctr chacha20; do
    openssl enc -$cipher -K $key -iv $iv -in data -out sealed 2>/dev/null
    echo "$cipher: $? $(sha256sum <sealed | cut -c1-16)"
    result "$cipher back" openssl enc -d -$cipher -K $key -iv $iv -in sealed
    cmp -s out data && echo "$cipher: as it was"
done
result gmac openssl mac -cipher AES-256-GCM -macopt hexkey:$key -macopt hexiv:f0f1f2f3f4f5f6f7f8f9fafb -in data GMAC
result cmac openssl mac -cipher AES-256-CBC -macopt hexkey:$key -in data CMAC
result poly1305 openssl mac -macopt hexkey:$key -in data Poly1305
result kmac openssl mac -macopt hexkey:$key -in data KMAC-256
result siphash openssl mac -macopt hexkey:000102030405060708090a0b0c0d0e0f -in data SIPHASH

# Signatures and agreements that use no random number: BMI2, ADX and AVX2 arithmetic.
head -c 64 data >message
for key in rsa ed25519 ed448; do
    case $key in
        rsa) result "sign $key" openssl dgst -sha256 -sign /keys/rsa.pem -r data ;;
        *) result "sign $key" openssl pkeyutl -sign -rawin -inkey /keys/$key.pem -in message ;;
    esac
    cp out signature
    openssl pkey -in /keys/$key.pem -pubout -out public 2>/dev/null
    case $key in
        rsa) result "verify $key" openssl dgst -sha256 -verify public -signature signature data ;;
        *) result "verify $key" openssl pkeyutl -verify -rawin -pubin -inkey public -in message -sigfile signature ;;
    esac
done
for curve in x25519 x448 p256 p384 p521; do
    openssl pkey -in /keys/$curve-2.pem -pubout -out public 2>/dev/null
    result "agree $curve" openssl pkeyutl -derive -inkey /keys/$curve.pem -peerkey public
done
set -- "-evp aes-256-gcm" rsa2048
[ "$long" ] && set -- "$@" "-evp chacha20-poly1305" "-evp sha512" ecdsap256 ed25519
for what in "$@"; do
    openssl speed -seconds 1 -bytes 1024 $what >/dev/null 2>&1
    echo "speed $what: $?"
done

# Compressors.
{ cat /usr/bin/openssl; seq 1 "$(megabytes 0 1 | tr -d '\n')"; } 2>/dev/null | head -c "$(megabytes 2 20)" >mixed
for level in 1 3 ${long:+19}; do
    zstd -q -f -$level mixed -o packed
    echo "zstd -$level: $? $(sha256sum <packed | cut -c1-16)"
    result "zstd -$level back" zstd -q -d -c packed
    cmp -s out mixed && echo "zstd -$level: as it was"
done
for level in 0 ${long:+6}; do
    xz -k -c -T1 -$level mixed >packed
    echo "xz -$level: $? $(sha256sum <packed | cut -c1-16)"
    result "xz -$level back" xz -d -c packed
    cmp -s out mixed && echo "xz -$level: as it was"
done
gzip -n -9 -c mixed >packed
echo "gzip: $? $(sha256sum <packed | cut -c1-16)"

# A sort of text lines, and a database.
noise "$(megabytes 1 75)" | base64 -w 75 >lines
result "sort" sort lines
sort -c out && echo "sorted: $(wc -c <out)"
rows=$(megabytes 0 1 | sed 's/^0*$/20000/; s/000$//')
cat >script <<SQL
PRAGMA journal_mode=WAL;
CREATE TABLE t (id INTEGER PRIMARY KEY, k TEXT UNIQUE, x REAL, b BLOB);
BEGIN;
WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < $rows)
INSERT INTO t SELECT i, printf('%08x', (i * 2654435761) % 4294967296), i / 7.0, zeroblob(i % 50) FROM n;
COMMIT;
CREATE INDEX by_x ON t (x DESC, k);
DELETE FROM t WHERE id % 3 = 0;
UPDATE t SET x = x * 1.1 + sqrt(abs(x)) WHERE id % 5 = 0;
VACUUM;
SELECT count(*), sum(id), max(k), printf('%.15g', sum(x)), printf('%.15g', avg(x * x)), sum(length(b)) FROM t;
SELECT k, printf('%.17g', x) FROM t ORDER BY x DESC, k LIMIT 200;
PRAGMA integrity_check;
SQL
rm -f base
sqlite3 base <script >out 2>err
echo "sqlite: $? $(sha256sum <out | cut -c1-16) $(tail -n 1 out) $(sha256sum <base | cut -c1-16)"

if [ "$long" ]; then
    # A compiler, and what it made.
    for level in 0 2 3; do
        gcc -O$level -march=x86-64-v3 -ffile-prefix-map=/tmp=. -c /programs/library.c -o library.o 2>/dev/null
        echo "gcc -O$level: $? $(sha256sum <library.o | cut -c1-16)"
        gcc -O$level -march=x86-64-v3 /programs/main.c library.o -lm -o program 2>/dev/null
        result "its program" ./program
    done
    # Python's own tests.
    for module in math cmath float decimal fractions struct long int random statistics hashlib zlib lzma bz2 json re set dict; do
        python3 -m test -q test_$module >out 2>&1 </dev/null
        echo "python $module: $?"
    done
    cat >script.py <<'PYTHON'
import decimal, hashlib, math, sys
sys.set_int_max_str_digits(0)
decimal.getcontext().prec = 2000
print(decimal.Decimal(2).sqrt(), decimal.Decimal(1).exp())
print(sum(math.sin(i) * math.exp(-i / 1e4) for i in range(200000)).hex())
print(math.fsum(math.gamma(1 + i / 1e4) for i in range(20000)).hex())
print(hashlib.sha256(str(3 ** 200000 % 10 ** 30000).encode()).hexdigest())
PYTHON
    result "python script" python3 script.py
fi
echo END
