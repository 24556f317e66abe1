//! The configuration of the 16 tasks in longctx_bench (`config/eval_config/longbench`).

use crate::Category;
use crate::metric::Metric;

/// A task's prompt and metric.
#[derive(Debug)]
pub(super) struct Spec {
    pub name: &'static str,
    pub category: Category,
    pub metric: Metric,
    pub max_new_tokens: usize,
    /// Prompt with the placeholders `{context}` and `{input}` for the record's fields.
    pub prompt: &'static str,
}

pub(super) const SPECS: [Spec; 16] = [
    Spec {
        name: "narrativeqa",
        category: Category::SingleDocQa,
        metric: Metric::QaF1,
        max_new_tokens: 128,
        prompt: "You are given a story, which can be either a novel or a movie script, and a question. Answer the question asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    },
    Spec {
        name: "qasper",
        category: Category::SingleDocQa,
        metric: Metric::QaF1,
        max_new_tokens: 128,
        prompt: "You are given a scientific article and a question. Answer the question as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    },
    Spec {
        name: "multifieldqa_en",
        category: Category::SingleDocQa,
        metric: Metric::QaF1,
        max_new_tokens: 64,
        prompt: "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    },
    Spec {
        name: "hotpotqa",
        category: Category::MultiDocQa,
        metric: Metric::QaF1,
        max_new_tokens: 32,
        prompt: "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    },
    Spec {
        name: "2wikimqa",
        category: Category::MultiDocQa,
        metric: Metric::QaF1,
        max_new_tokens: 32,
        prompt: "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    },
    Spec {
        name: "musique",
        category: Category::MultiDocQa,
        metric: Metric::QaF1,
        max_new_tokens: 32,
        prompt: "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    },
    Spec {
        name: "gov_report",
        category: Category::Summarization,
        metric: Metric::RougeL,
        max_new_tokens: 512,
        prompt: "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    },
    Spec {
        name: "qmsum",
        category: Category::Summarization,
        metric: Metric::RougeL,
        max_new_tokens: 512,
        prompt: "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
    },
    Spec {
        name: "multi_news",
        category: Category::Summarization,
        metric: Metric::RougeL,
        max_new_tokens: 512,
        prompt: "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    },
    Spec {
        name: "trec",
        category: Category::FewShot,
        metric: Metric::Classification,
        max_new_tokens: 64,
        prompt: "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    },
    Spec {
        name: "triviaqa",
        category: Category::FewShot,
        metric: Metric::QaF1,
        max_new_tokens: 32,
        prompt: "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following are some examples.\n\n{context}\n\n{input}",
    },
    Spec {
        name: "samsum",
        category: Category::FewShot,
        metric: Metric::RougeL,
        max_new_tokens: 128,
        prompt: "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    },
    Spec {
        name: "passage_retrieval_en",
        category: Category::Synthetic,
        metric: Metric::Retrieval,
        max_new_tokens: 32,
        prompt: "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be like \"Paragraph 1\", \"Paragraph 2\", etc.\n\nThe answer is: ",
    },
    Spec {
        name: "passage_count",
        category: Category::Synthetic,
        metric: Metric::Count,
        max_new_tokens: 32,
        prompt: "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
    },
    Spec {
        name: "lcc",
        category: Category::Code,
        metric: Metric::CodeSimilarity,
        max_new_tokens: 64,
        prompt: "Please complete the code given below. \n{context}Next line of code:\n",
    },
    Spec {
        name: "repobench-p",
        category: Category::Code,
        metric: Metric::CodeSimilarity,
        max_new_tokens: 64,
        prompt: "Please complete the code given below. \n{context}{input}Next line of code:\n",
    },
];
