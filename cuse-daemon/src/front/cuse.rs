//! `/dev/kvm` as a character device of ours, where the kernel has CUSE.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cuse_rs::{Device, Kind, Session};

use super::{CharacterDevice, Front};

/// How long udev or devtmpfs may take to make the device node.
const PATIENCE: Duration = Duration::from_secs(5);

/// Can this host have a character device of ours at `path`? Not if one is there already: the kernel's own would stay.
pub fn is_possible(path: &Path) -> bool {
    path == Path::new("/dev/kvm") && Path::new("/dev/cuse").exists() && !path.exists()
}

/// Makes `/dev/kvm`. It goes with the daemon.
pub fn start(front: &Arc<Front>) -> Result<()> {
    let device = Device::open(Path::new("/dev/cuse")).context("cannot open /dev/cuse. Next step: modprobe cuse")?;
    let kind = Kind::Cuse { name: "kvm".into() };
    let session =
        Session::start(device, kind, Arc::new(CharacterDevice(Arc::clone(front)))).context("cannot serve CUSE")?;
    let start = Instant::now();
    while !Path::new("/dev/kvm").exists() {
        if session.is_over() || start.elapsed() > PATIENCE {
            bail!("the kernel did not make /dev/kvm. Next step: see dmesg, or mount devtmpfs on /dev");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    front.device.set(session).map_err(|_| anyhow::anyhow!("/dev/kvm is served twice"))
}
