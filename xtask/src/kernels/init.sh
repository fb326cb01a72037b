#!/bin/busybox sh
# The guest's first process: mounts what the kernel offers, runs /test.sh,
# sends its output to the second serial port and its exit code to QEMU through port 0xf4.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /run /sbin /usr/bin /usr/sbin
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s
mount -t sysfs sysfs /sys
[ -e /dev/null ] || mount -t devtmpfs devtmpfs /dev
mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
ip link set lo up
echo "GUEST-INIT up=$(cut -d' ' -f1 /proc/uptime) release=$(uname -r)" > /dev/ttyS0
for module in virtio_pci virtio_blk nvme; do modprobe $module; done
# Disks are probed in the background.
expected=$(cat /test.disks)
for wait in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ "$(ls -d /sys/block/vd* /sys/block/nvme* 2>/dev/null | wc -l)" -ge "$expected" ] && break
    sleep 0.2
done
echo "GUEST-TEST up=$(cut -d' ' -f1 /proc/uptime)" > /dev/ttyS0
cd /tmp
sh /test.sh > /dev/ttyS1 2>&1
code=$?
sync
echo "GUEST-EXIT code=$code up=$(cut -d' ' -f1 /proc/uptime)" > /dev/ttyS0
printf "\\x$(printf %02x $code)" | dd of=/dev/port bs=1 seek=244 count=1 2>/dev/null
poweroff -f
