//! Drives a disk image: lists its partitions and files, copies files in and out, fills and checks it.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, bail, ensure};
use axdriver_block::BlockDriverOps;
use clap::Parser;
use examples::{
    board::{Board, BoardArgs, Device, Map, Medium, Place},
    fat::{self, BlockStream},
    partition::{self, Partition, Scheme},
    report::{self, Table},
    say, work,
};

/// Drives a disk image through a virtio disk, or the disk of another program through vhost-user.
///
/// Without further options, the partitions and the files of FAT file systems are listed, and nothing is written: an image
/// is opened for reading only.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The image, as `truncate -s 64M disk.img` makes it; with --board qemu it may be a qcow2 one.
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "socket",
        conflicts_with = "socket"
    )]
    disk: Option<PathBuf>,

    #[command(flatten)]
    board: BoardArgs,

    /// The partition to work on. Needed only where there are several with FAT.
    #[arg(long, value_name = "NUMBER")]
    partition: Option<usize>,

    /// Copies a file of the host into a directory of the disk that exists.
    #[arg(long, num_args = 2, value_names = ["HOST_FILE", "DISK_FILE"], action = clap::ArgAction::Append)]
    copy_in: Vec<PathBuf>,

    /// Copies a file of the disk to the host.
    #[arg(long, num_args = 2, value_names = ["DISK_FILE", "HOST_FILE"], action = clap::ArgAction::Append)]
    copy_out: Vec<PathBuf>,

    /// Makes an empty FAT file system on the whole disk.
    #[arg(long, requires = "destroy_all_data", conflicts_with_all = ["verify", "partition"])]
    format: bool,

    /// Fills the whole disk with a pattern, and checks that it holds it.
    #[arg(long, requires = "destroy_all_data", conflicts_with_all = ["copy_in", "copy_out", "partition"])]
    verify: bool,

    /// Says that all that is on the disk may be lost, which --format and --verify ask for.
    #[arg(long)]
    destroy_all_data: bool,

    /// Shows what the drivers log. Twice: all of it.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::log_to_stderr(args.verbose);
    report::run(|| drive(&args))
}

/// A disk on a board, whose driver can be started again and again.
struct Disk {
    map: Map,
    place: Place,
    /// As the user calls it.
    name: String,
    _board: Box<dyn Board>,
}

impl Disk {
    /// Makes the board that the arguments ask for.
    fn new(args: &Args) -> anyhow::Result<Self> {
        let changes = args.format || args.verify || !args.copy_in.is_empty();
        let medium = match &args.disk {
            Some(path) => Medium::Image {
                path: path.clone(),
                read_only: !changes,
            },
            None => Medium::Elsewhere,
        };
        let board = args.board.start([Device::Disk(medium)])?;
        let map = board.map();
        let mut found = map.probe().into_iter();
        let found = found.next().context("the disk is not found on the board")?;
        let name = match &args.disk {
            Some(path) => path.display().to_string(),
            None => found.place.to_string(),
        };
        Ok(Self {
            map,
            place: found.place,
            name,
            _board: board,
        })
    }

    fn start(&self) -> anyhow::Result<Box<dyn BlockDriverOps>> {
        self.map.start_disk(&self.place)
    }
}

fn drive(args: &Args) -> anyhow::Result<()> {
    let disk = Disk::new(args)?;
    if args.verify {
        return verify(&disk);
    }
    if args.format {
        let mut stream = BlockStream::new(disk.start()?)?;
        fat::format(&mut stream, "axdriver")?;
        say!("formatted {}", disk.name)?;
    }
    copy(&disk, args)?;
    if args.copy_in.is_empty() && args.copy_out.is_empty() {
        list(&disk)?;
    }
    Ok(())
}

/// Prints what is on the disk.
fn list(on: &Disk) -> anyhow::Result<()> {
    let mut disk = on.start()?;
    let (blocks, block_size) = (disk.num_blocks(), disk.block_size());
    let size = report::size(blocks.saturating_mul(block_size as u64));
    let access = if disk.capabilities().read_only {
        "read-only"
    } else {
        "writable"
    };
    say!(
        "{}: {size}, {blocks} blocks of {block_size} bytes, {access}",
        on.name
    )?;

    let (scheme, partitions) = partition::read_table(&mut disk)?;
    say!("{scheme}")?;
    if scheme == Scheme::Whole {
        let volume = print_volume(&mut BlockStream::new(disk)?, "the whole disk");
        return volume
            .with_context(|| format!("{} holds no partition table, and no file system", on.name));
    }
    let mut table = Table::new(["number", "first block", "blocks", "size", "type", "name"]);
    for Partition {
        number,
        first_block,
        blocks,
        kind,
        name,
    } in &partitions
    {
        let size = report::size(blocks.saturating_mul(block_size as u64));
        table.row([
            number.to_string(),
            first_block.to_string(),
            blocks.to_string(),
            size,
            kind.clone(),
            name.clone(),
        ]);
    }
    say!("\n{}", table.to_string().trim_end())?;
    for Partition {
        number,
        first_block,
        blocks,
        ..
    } in partitions
    {
        let mut stream = BlockStream::range(&mut disk, first_block, blocks)?;
        // Most partitions hold something else.
        if is_fat(&mut stream) {
            print_volume(&mut stream, &format!("partition {number}"))?;
        }
    }
    Ok(())
}

fn is_fat<D: BlockDriverOps>(stream: &mut BlockStream<D>) -> bool {
    fat::mounted(stream, |_| Ok(())).is_ok()
}

/// Prints the files of a FAT file system.
fn print_volume<D: BlockDriverOps>(stream: &mut BlockStream<D>, what: &str) -> anyhow::Result<()> {
    let (fat_type, entries) = fat::mounted(stream, |fs| Ok((fs.fat_type(), fat::list(fs)?)))?;
    say!("\n{what}: {fat_type:?}")?;
    print_files(&entries)
}

fn print_files(entries: &[fat::Entry]) -> anyhow::Result<()> {
    if entries.is_empty() {
        say!("no files")?;
    }
    let size = |entry: &fat::Entry| {
        entry
            .size
            .map_or_else(|| "-".to_owned(), |size| size.to_string())
    };
    let width = entries
        .iter()
        .map(|entry| size(entry).len())
        .max()
        .unwrap_or(0);
    for entry in entries {
        let slash = if entry.size.is_none() { "/" } else { "" };
        say!("{:>width$}  {}{slash}", size(entry), entry.path)?;
    }
    Ok(())
}

/// Copies files as asked.
fn copy(disk: &Disk, args: &Args) -> anyhow::Result<()> {
    if args.copy_in.is_empty() && args.copy_out.is_empty() {
        return Ok(());
    }
    let mut stream = open_volume(disk, args)?;
    for pair in args.copy_in.chunks_exact(2) {
        let (source, target) = (&pair[0], disk_path(&pair[1])?);
        let mut file =
            File::open(source).with_context(|| format!("cannot open {}", source.display()))?;
        let metadata = file.metadata()?;
        ensure!(!metadata.is_dir(), "{} is a directory", source.display());
        let bar = report::progress(metadata.len(), "copying");
        let copied = fat::mounted(&mut stream, |fs| {
            fat::write_file(fs, target, &mut file, &mut |bytes| bar.set_position(bytes))
        })?;
        bar.finish_and_clear();
        say!(
            "copied {} to {target} on the disk, {copied} bytes",
            source.display()
        )?;
    }
    for pair in args.copy_out.chunks_exact(2) {
        let (source, target) = (disk_path(&pair[0])?, &pair[1]);
        let room = stream.size();
        let copied = fat::mounted(&mut stream, |fs| {
            // The host's file is made only when there is something to put in it.
            let size = fs
                .root_dir()
                .open_file(source.trim_matches('/'))
                .and_then(|mut file| file.seek(SeekFrom::End(0)));
            let size = size.with_context(|| format!("cannot open {source} on the disk"))?;
            // In a damaged file system, the parts of a file can follow each other in a circle.
            ensure!(
                size <= room,
                "{source} is damaged: its {size} bytes are more than the {room} of the file system"
            );
            let mut file = File::create(target)
                .with_context(|| format!("cannot create {}", target.display()))?;
            let bar = report::progress(size, "copying");
            let copied =
                fat::read_file(fs, source, &mut file, &mut |bytes| bar.set_position(bytes))?;
            bar.finish_and_clear();
            Ok(copied)
        })?;
        say!(
            "copied {source} of the disk to {}, {copied} bytes",
            target.display()
        )?;
    }
    Ok(())
}

fn disk_path(path: &Path) -> anyhow::Result<&str> {
    path.to_str()
        .with_context(|| format!("FAT has no name for {}", path.display()))
}

/// Opens the part of the disk with the FAT file system that is meant.
fn open_volume(on: &Disk, args: &Args) -> anyhow::Result<BlockStream<Box<dyn BlockDriverOps>>> {
    let mut disk = on.start()?;
    let (scheme, partitions) = partition::read_table(&mut disk)?;
    if scheme == Scheme::Whole && args.partition.is_none() {
        return Ok(BlockStream::new(disk)?);
    }
    let mut suitable = Vec::new();
    for partition in partitions {
        let wanted = args
            .partition
            .is_none_or(|number| number == partition.number);
        if wanted
            && is_fat(&mut BlockStream::range(
                &mut disk,
                partition.first_block,
                partition.blocks,
            )?)
        {
            suitable.push(partition);
        }
    }
    match (suitable.as_slice(), args.partition) {
        ([one], _) => Ok(BlockStream::range(disk, one.first_block, one.blocks)?),
        ([], None) => bail!("no partition holds a FAT file system"),
        ([], Some(number)) => bail!("there is no partition {number} with a FAT file system"),
        (several, _) => {
            let numbers: Vec<String> = several
                .iter()
                .map(|partition| partition.number.to_string())
                .collect();
            bail!(
                "partitions {} hold FAT file systems: choose one with --partition",
                numbers.join(", ")
            )
        }
    }
}

/// Fills the disk, starts the driver afresh, and compares.
fn verify(on: &Disk) -> anyhow::Result<()> {
    let mut disk = on.start()?;
    let bytes = disk.num_blocks().saturating_mul(disk.block_size() as u64);
    for step in [work::Step::Fill, work::Step::Check] {
        let bar = report::progress(bytes, step.name());
        let start = Instant::now();
        work::verify(&mut disk, step, &mut |bytes| bar.set_position(bytes))?;
        bar.finish_and_clear();
        say!(
            "{}: {}, {}",
            step.name(),
            report::size(bytes),
            report::rate(bytes, start.elapsed())
        )?;
        drop(disk);
        disk = on.start()?;
    }
    say!("all {} blocks hold what was written", disk.num_blocks())?;
    Ok(())
}
