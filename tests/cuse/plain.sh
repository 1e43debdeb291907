#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
chmod 755 /run
insmod /fuse.ko
insmod /cuse.ko
setpriv() { /sbin/setpriv "$@"; } # busybox has one that can do less
member() { user=$1; shift; setpriv --reuid=$user --regid=$user --groups=@GROUP@ -- "$@"; }
stranger() { setpriv --reuid=3000 --regid=3000 --clear-groups -- "$@"; }
opens() { "$@" sh -c ': <>/dev/kvm' 2>/dev/null && echo yes || echo no; }
modern() { "$@" kvm_ioctls --exact --test-threads=1 ioctls::vcpu::tests::test_run_code ioctls::vcpu::tests::xsave_test; }

/sbin/setpriv --no-new-privs --bounding-set=@CAPABILITIES@ -- softkvm serve &
daemon=$!
while ! [ -c /dev/kvm ]; do sleep 0.1; done
echo DEVICE: $(stat -c %F /dev/kvm)
echo SUBSYSTEM: $(basename $(readlink -f /sys/class/*/kvm/subsystem))
softkvm status
modern env
echo CUSE: $?
legacy --seconds 2 header smp display signals reset
echo LEGACY: $?

echo BEFORE: $(opens member 1000) $(opens stranger)
chgrp @RULE_GROUP@ /dev/kvm
chmod @RULE_MODE@ /dev/kvm
echo RULE: $(opens member 1000) $(opens stranger)
modern member 1000
echo USER: $?
member 1000 legacy --seconds 2 header smp display locked signals reset
echo USER LEGACY: $?

member 1000 legacy --seconds 1000 spin >/dev/null &
sleep 3
victim=$(pidof legacy)
echo VICTIM: $(stat -c %u /proc/$victim) $(ls -l /proc/$victim/fd | grep -c kvm-vm)
fd=$(ls -l /proc/$victim/fd | sed -n 's/.* \([0-9]*\) -> .*kvm-vm.*/\1/p' | head -n 1)
echo OTHER: $(member 2000 sh -c ": <>/proc/$victim/fd/$fd" 2>/dev/null && echo yes || echo no)
echo OTHER MEMORY: $(member 2000 sh -c ": </proc/$victim/mem" 2>/dev/null && echo yes || echo no)
echo ROOT: $(sh -c ": <>/proc/$victim/fd/$fd" 2>/dev/null && echo yes || echo no)
member 2000 legacy --seconds 1 reset
echo OTHER LEGACY: $?
kill $victim
softkvm status
kill $daemon
wait $daemon
echo SERVE: $?
[ -e /dev/kvm ] && echo /dev/kvm is still there

softkvm serve --group kvm &
daemon=$!
while ! [ -c /dev/kvm ]; do sleep 0.1; done
while [ "$(stat -c '%a %G' /dev/kvm)" = '600 root' ]; do sleep 0.1; done
echo GROUP: $(stat -c '%a %U %G' /dev/kvm) $(opens member 1000) $(opens stranger)
kill $daemon
wait $daemon

softkvm run -- kvm_ioctls --exact --test-threads=1 ioctls::vcpu::tests::test_run_code
echo FUSE: $?
softkvm run -- legacy --seconds 1 header reset
echo FUSE LEGACY: $?
poweroff -f
