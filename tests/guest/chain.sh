# NAME DISK FIRST-BLOCK LINES [dd options]: prints LINES lines. Each depends on all before it, by a variable, by a file of
# 64 KiB in memory and by 16 blocks of the disk, all of which it changes. $b is busybox, $tmp a
# folder, $pause how long it sleeps between two lines, in microseconds.
name=$1 disk=$2 first=$3 last=$4 read=$5 write=$6
dd="$b dd bs=4096 count=1 conv=notrunc"
hash=$name file=$tmp/$name line=0
$b dd if=/dev/zero of=$file bs=4096 count=16 2>/dev/null
while [ $line != $last ]; do
    block=$((line % 16))
    hash=$({ echo $hash; $b cat $file; $dd if=$disk skip=$((first + block)) $read; } 2>/dev/null | $b sha256sum)
    hash=${hash%% *}
    echo "$name $line $hash"
    echo $hash | $b dd of=$file bs=65 seek=$((line * 7 % 1000)) conv=notrunc 2>/dev/null
    $dd if=$file skip=$block of=$disk seek=$((first + block)) $write 2>/dev/null
    line=$((line + 1))
    [ $pause = 0 ] || $b usleep $pause
done
