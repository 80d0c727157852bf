//! Files that are of no use after the run.

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Context;

/// A directory of this process alone, which is removed with all that is in it when this is dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes an empty directory with `purpose` in its name.
    ///
    /// # Errors
    ///
    /// The directory for temporary files cannot be written.
    pub fn new(purpose: &str) -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("axdriver-{purpose}-{}-{count}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// Returns where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// A file that other programs can open as long as this process has it, and that is gone after that however the process ends.
#[derive(Debug)]
pub struct UnnamedFile(File);

impl UnnamedFile {
    /// Makes a file of `size` bytes, all 0.
    ///
    /// # Errors
    ///
    /// The directory for temporary files cannot be written.
    pub fn new(size: u64) -> anyhow::Result<Self> {
        let directory = Scratch::new("file")?;
        let path = directory.path().join("unnamed");
        let make = || {
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)?;
            file.set_len(size)?;
            Ok::<_, std::io::Error>(file)
        };
        Ok(Self(make().with_context(|| {
            format!("cannot create {}", path.display())
        })?))
    }

    /// Returns where others find it: Linux has a path for each open file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_name_is_found_by_its_path() {
        let file = UnnamedFile::new(5).unwrap();
        std::fs::write(file.path(), "ab").unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"ab");
        let path = file.path();
        drop(file);
        assert!(std::fs::read(path).is_err());
    }
}
