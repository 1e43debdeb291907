#!/bin/dash
# The workloads of `cargo xtask bench` that are Debian's programs: `programs.sh SCALE NAME...`, as work.c.
export PATH=/usr/bin:/usr/sbin LC_ALL=C TZ=UTC HOME=/tmp
scale=$1
shift
cd /tmp || exit 1

# SCALE percent of a number, 1 at least.
of() { echo $(($1 * scale / 100 + ($1 * scale < 100))); }
short() { sha256sum | cut -c1-16; }
# NAME FUNCTION: everything that it needs has been read from the disk once.
workload() {
    echo "BEGIN $1"
    result=$($2 2>/tmp/errors)
    echo "END $1 ${result:-$(head -n 1 /tmp/errors)}"
    sleep 0.1
}

python_start() { for _ in $(seq "$(of 10)"); do python3 -c 'print(1)'; done | short; }
python_loop() {
    python3 - "$(of 400000)" <<'PYTHON'
import sys
total = 0
names = {}
for i in range(int(sys.argv[1])):
    total = (total * 31 + (i ^ total >> 7)) & 0xffffffff
    names[total % 97] = names.get(total % 97, 0) + 1
print("%x" % total, len(names))
PYTHON
}
compress() { gzip -9 -n <data | short; }
hash() { for _ in $(seq "$(of 10)"); do openssl dgst -sha256 -r data; done | short; }
insert() {
    rm -f base
    {
        echo 'CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT UNIQUE, value REAL);'
        echo 'BEGIN;'
        seq "$(of 20000)" | sed "s/.*/INSERT INTO t VALUES (&, 'name-' || (& * 7919 % 1000003), & * 0.5);/"
        echo 'COMMIT; SELECT count(*), max(name), sum(value) FROM t;'
    } | sqlite3 base
}
compile() { for _ in $(seq "$(of 1)"); do gcc -O2 -c /bench/work.c -o - | short; done | short; }
resolve() { for _ in $(seq "$(of 5)"); do apt-get --simulate install gcc python3 make sqlite3 openssl; done | grep -c ^Inst; }
build() {
    rm -f *.o
    make -s -j2 -f /bench/Makefile objects="$(seq -s ' ' -f 'part%g.o' "$(of 4)")"
    cat part*.o | short
}

for name; do
    case $name in
        python-start) python3 -c 'print(1)' >/dev/null && workload "$name" python_start ;;
        python-loop) workload "$name" python_loop ;;
        gzip | sha256)
            # Programs, libraries and text, as much of each as there is.
            [ -e data ] || cat /usr/lib/python3*/*.py /usr/bin/* /usr/lib/x86_64-linux-gnu/*.so.* 2>/dev/null | head -c "$(of 10000000)" >data
            case $name in
                gzip) workload "$name" compress ;;
                sha256) openssl version >/dev/null && workload "$name" hash ;;
            esac
            ;;
        sqlite) echo | sqlite3 && workload "$name" insert ;;
        gcc) gcc -O2 -c /bench/work.c -o /dev/null && workload "$name" compile ;;
        apt) apt-get -q -q update >/dev/null && workload "$name" resolve ;;
        make) gcc -O2 -c /bench/work.c -o /dev/null && workload "$name" build ;;
    esac
done
