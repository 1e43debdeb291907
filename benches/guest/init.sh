#!/bin/busybox sh
echo USER SPACE
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
# From here on nobody but the workloads writes to the console.
echo 1 >/proc/sys/kernel/printk
word() { $b sed -n "s/.*\\b$1=\\([^ ]*\\).*/\\1/p" /proc/cmdline | $b tr , ' '; }
scale=$(word scale)
/bin/work "$scale" $(word cpu)
if [ "$(word virtio)" ]; then
    for module in /modules/*; do $b insmod "$module"; done
    if [ -e /sys/bus/virtio/devices/virtio0 ]; then
        $b ip link set eth0 up
        $b ip address add 10.0.2.15/24 dev eth0
        /bin/work "$scale" $(word virtio)
    fi
fi
$b poweroff -f
