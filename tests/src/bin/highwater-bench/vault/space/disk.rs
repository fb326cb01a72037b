//! A disk that is lived on: files of many kinds come, change and go from day to day.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::Result;
use highwater_tests::{FileSystem, Mounted, Random};

/// Of the disk, in 1/256, at the beginning.
const PHOTOGRAPHS: u64 = 64;
const TEXTS: u64 = 48;
const SOURCES: u64 = 16;
const DATABASE: u64 = 32;
const LOG_A_DAY: u64 = 2;
const PHOTOGRAPHS_A_DAY: u64 = 2;
const PAGE_BYTES: usize = 8192;

/// See the module. Mounted only while it is written to.
pub struct LivedIn {
    image: PathBuf,
    disk_bytes: u64,
    random: Random,
    words: Vec<String>,
    day: u64,
    photographs: u64,
    texts: Vec<u64>,
}

impl LivedIn {
    /// An empty filesystem.
    pub fn new(image: PathBuf, disk_bytes: u64) -> Result<Self> {
        File::create(&image)?.set_len(disk_bytes)?;
        FileSystem::Ext4.make(&image)?;
        let mut random = Random::new(14);
        let words = (0..4096).map(|_| word(&mut random)).collect();
        Ok(Self { image, disk_bytes, random, words, day: 0, photographs: 0, texts: Vec::new() })
    }

    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Bytes of the image that are not holes.
    pub fn allocated_bytes(&self) -> Result<u64> {
        Ok(fs::metadata(&self.image)?.blocks() * 512)
    }

    /// The first day brings most of what there is.
    pub fn live_a_day(&mut self) -> Result<()> {
        let mounted = Mounted::existing(FileSystem::Ext4, &self.image, "")?;
        let dir = mounted.path();
        if self.day == 0 {
            for name in ["photographs", "texts", "sources"] {
                fs::create_dir(dir.join(name))?;
            }
            self.photographs(dir, self.part(PHOTOGRAPHS))?;
            self.new_texts(dir, self.part(TEXTS))?;
            self.sources(dir, self.part(SOURCES))?;
            self.database(dir, 1, 1)?;
        } else {
            self.photographs(dir, self.part(PHOTOGRAPHS_A_DAY))?;
            // One text in thirty is written anew, one in sixty goes, and as much comes.
            for n in 0..self.texts.len() / 30 {
                let text = self.texts[self.random.below(self.texts.len() as u64) as usize];
                self.text(&dir.join(format!("texts/{text}")))?;
                if n % 2 == 0 {
                    let at = self.random.below(self.texts.len() as u64) as usize;
                    fs::remove_file(dir.join(format!("texts/{}", self.texts.swap_remove(at))))?;
                }
            }
            self.new_texts(dir, self.part(TEXTS) / 60)?;
            self.database(dir, 2, 100)?;
            if self.day.is_multiple_of(7) {
                // The week's log is compressed and thrown away elsewhere.
                fs::remove_file(dir.join("log"))?;
            }
        }
        let log = self.prose(self.part(LOG_A_DAY) as usize);
        OpenOptions::new().create(true).append(true).open(dir.join("log"))?.write_all(&log)?;
        self.day += 1;
        Ok(())
    }

    const fn part(&self, of_256: u64) -> u64 {
        self.disk_bytes / 256 * of_256
    }

    /// Cannot be compressed.
    fn photographs(&mut self, dir: &Path, bytes: u64) -> Result<()> {
        let mut left = bytes;
        while left > 0 {
            let size = (500_000 + self.random.below(3_000_000)).min(left);
            let mut content = vec![0; size as usize];
            self.random.fill(&mut content);
            fs::write(dir.join(format!("photographs/{}", self.photographs)), &content)?;
            self.photographs += 1;
            left -= size;
        }
        Ok(())
    }

    fn new_texts(&mut self, dir: &Path, bytes: u64) -> Result<()> {
        let mut written = 0;
        while written < bytes {
            let name = self.texts.iter().max().map_or(0, |last| last + 1);
            written += self.text(&dir.join(format!("texts/{name}")))?;
            self.texts.push(name);
        }
        Ok(())
    }

    fn text(&mut self, path: &Path) -> Result<u64> {
        let size = 20_000 + self.random.below(400_000);
        let text = self.prose(size as usize);
        fs::write(path, &text)?;
        Ok(size)
    }

    fn sources(&mut self, dir: &Path, bytes: u64) -> Result<()> {
        let (mut left, mut n) = (bytes, 0);
        while left > 0 {
            let size = (1000 + self.random.below(20_000)).min(left);
            let text = self.prose(size as usize);
            fs::write(dir.join(format!("sources/{n}")), &text)?;
            (left, n) = (left - size, n + 1);
        }
        Ok(())
    }

    /// Writes so many of its pages, any of them, in place; half of a page is numbers, the rest text.
    fn database(&mut self, dir: &Path, part: u64, of: u64) -> Result<()> {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("database"))?;
        let pages = self.part(DATABASE) / PAGE_BYTES as u64;
        for n in 0..pages * part / of {
            let page = if part == of { n } else { self.random.below(pages) };
            let mut content = self.prose(PAGE_BYTES);
            self.random.fill(&mut content[..PAGE_BYTES / 2]);
            file.write_all_at(&content, page * PAGE_BYTES as u64)?;
        }
        Ok(())
    }

    fn prose(&mut self, bytes: usize) -> Vec<u8> {
        let mut text = Vec::with_capacity(bytes + 16);
        while text.len() < bytes {
            // Some words are far more frequent than others.
            let most = 1 + self.random.below(self.words.len() as u64);
            let word = &self.words[self.random.below(most) as usize];
            text.extend_from_slice(word.as_bytes());
            text.push(b' ');
        }
        text.truncate(bytes);
        text
    }
}

fn word(random: &mut Random) -> String {
    let length = 2 + random.below(9);
    (0..length).map(|_| char::from(b'a' + random.below(26) as u8)).collect()
}
