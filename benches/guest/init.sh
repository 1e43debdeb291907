#!/bin/busybox sh
echo USER SPACE
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
# From here on nobody but the workloads writes to the console.
echo 1 >/proc/sys/kernel/printk
word() { $b sed -n "s/.*\\b$1=\\([^ ]*\\).*/\\1/p" /proc/cmdline | $b tr , ' '; }
load() { while read -r module; do $b insmod "/modules/$module"; done; }
scale=$(word scale)
[ "$(word cpu)" ] && /bin/work "$scale" $(word cpu)
# In a fixed order, so that the disc is the first disk.
[ "$(word virtio)$(word programs)" ] && load </modules/virtio
if [ "$(word virtio)" ] && [ -e /sys/bus/virtio/devices/virtio0 ]; then
    $b ip link set eth0 up
    $b ip address add 10.0.2.15/24 dev eth0
    /bin/work "$scale" $(word virtio)
fi
if [ "$(word programs)" ]; then
    load </modules/ata
    until disk=$($b findfs LABEL=softkvm-bench); do $b usleep 20000; done 2>/dev/null
    $b mount -t ext4 -o noatime "$disk" /root
    programs=$(word programs)
    for folder in dev proc sys; do $b mount --move /$folder /root/$folder; done
    $b mount -t tmpfs tmpfs /root/tmp
    $b chroot /root /usr/bin/dash /bench/programs.sh "$scale" $programs
fi
$b poweroff -f
