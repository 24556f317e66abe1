//! Laws of the long-generation tasks: right answers score 1, damaged ones less; same seed, same
//! samples.

use longctx_eval::Category;
use longctx_eval::long_generation::{Size, tasks};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn correct_answers_score_1_and_damaged_ones_less(
        items in 3_usize..120,
        seed: u64,
        at in any::<prop::sample::Index>(),
    ) {
        let size = Size { items, samples: 2, seed };
        for (task, again) in tasks(size).iter().zip(tasks(size)) {
            prop_assert_eq!(task.category(), Category::LongGeneration);
            let samples = task.samples().unwrap().samples;
            prop_assert_eq!(&samples, &again.samples().unwrap().samples);
            prop_assert_ne!(&samples[0].turns, &samples[1].turns);
            for sample in &samples {
                prop_assert_eq!(sample.turns.len(), sample.answers.len());
                let right = task.score(sample, &sample.answers).unwrap().value;
                prop_assert_eq!(right, 1.0);

                let turn = at.index(sample.answers.len());
                let lines: Vec<&str> = sample.answers[turn].lines().collect();
                let line = at.index(lines.len());
                let mut wrong = lines.clone();
                wrong[line] = "0";
                let mut missing = lines.clone();
                missing.remove(line);
                let mut doubled = lines.clone();
                doubled.insert(line, "1");
                for damaged in [wrong, missing, doubled] {
                    let mut predictions = sample.answers.clone();
                    predictions[turn] = damaged.join("\n");
                    let score = task.score(sample, &predictions).unwrap().value;
                    prop_assert!((0.0..1.0).contains(&score), "{}: {score}", task.name());
                }
                let silent = vec![String::new(); sample.turns.len()];
                prop_assert_eq!(task.score(sample, &silent).unwrap().value, 0.0);
                prop_assert!(task.score(sample, &[]).is_err());
            }
        }
    }
}

#[test]
fn more_items_make_longer_texts() {
    let length = |items| -> Vec<usize> {
        let made = tasks(Size { items, samples: 1, seed: 0 });
        made.iter().map(|task| task.samples().unwrap().samples[0].turns.concat().len()).collect()
    };
    for (short, long) in length(10).into_iter().zip(length(1000)) {
        assert!(long > 5 * short, "{short} {long}");
    }
    assert!(tasks(Size { items: 0, samples: 1, seed: 0 })[0].samples().is_err());
}
